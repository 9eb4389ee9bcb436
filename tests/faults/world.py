"""The parts of a run: devices, daemons and the database, the connections between them, and which of these a fault
affects at present."""

from __future__ import annotations

import asyncio
import io
import math
import random
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from bench.fleet import Device, make_fleet, write_csv
from nexhb.devices import csv_import
from tests.faults import background
from tests.faults.cluster import Cluster
from tests.faults.daemon import Daemon
from tests.faults.devices import Habits, Kiosk
from tests.faults.guard import Guard
from tests.faults.journal import Journal
from tests.faults.managed_devices import MANAGED_DEVICES, ManagedDevices
from tests.faults.s3_store import S3Store
from tests.proxy import Proxy, Relay, Streams

REAL = ("nexhb",)  # the module that is run, and its first arguments


class Front(Relay):
    """The relay between the devices and the running daemons."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.daemons: list[Daemon] = []
        self._closed = 0

    @contextmanager
    def closed(self) -> Iterator[None]:
        """For the block, let no device connect to a daemon, whatever other faults of connections do."""
        self._closed += 1
        self.cut()
        try:
            yield
        finally:
            self._closed -= 1

    async def _open(self) -> Streams:
        running = [daemon for daemon in self.daemons if daemon.is_running]
        if not running or self._closed:
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", self._rng.choice(running).port)


@dataclass
class World:
    """All parts of a run."""

    seed: int
    folder: Path
    dsn: str
    cluster: Cluster | None  # None: the database does not belong to the run, so no fault may affect its server
    fleet: Sequence[Device]
    kiosks: list[Kiosk]
    journal: Journal
    front: Front
    proxies: list[Proxy]
    daemons: list[Daemon]  # the second daemon runs only at times
    managed_devices: ManagedDevices
    guard: Guard
    s3: S3Store  # an S3 server, in addition to the folder of archives
    violations_of_faults: list[tuple[str, str]] = field(default_factory=list)  # detected by faults: verdict, reason
    # Periods from a copy of the database until the copy replaced the original: heartbeats acknowledged then may be
    # lost.
    allowed_losses: list[tuple[float, float]] = field(default_factory=list)
    disconnecting_faults: int = 0  # faults in progress that may disconnect daemon and database
    reconnected_at_s: float = 0.0  # the end of the last such fault, on the machine's monotonic clock

    @property
    def archive(self) -> str:
        """Return the folder of the archives."""
        return f"{self.folder}/archive"

    @property
    def port(self) -> int:
        """Return the port to which devices send."""
        return self.front.port

    @property
    def connected_since_s(self) -> float:
        """Return since when daemon and database have been connected; infinity while a fault may disconnect them."""
        return math.inf if self.disconnecting_faults else self.reconnected_at_s

    @property
    def processes(self) -> frozenset[int]:
        """Return the PIDs of the running daemons."""
        return frozenset(daemon.pid for daemon in self.daemons if daemon.pid)

    def report(self, verdict: str, reason: str) -> None:
        """Record a violation of a promise that has to hold even during a fault."""
        self.violations_of_faults.append((verdict, reason))

    @property
    def in_flight(self) -> int:
        """Return the number of requests without a response."""
        return sum(kiosk.in_flight for kiosk in self.kiosks)

    @property
    def unsent(self) -> int:
        """Return the number of heartbeats that devices still have to send."""
        return sum(kiosk.unsent for kiosk in self.kiosks)

    @asynccontextmanager
    async def connection(self, **settings: str) -> AsyncIterator[asyncpg.Connection]:
        """Open a connection for the block, which bypasses the proxies."""
        conn = await asyncpg.connect(
            self.dsn, timeout=10, command_timeout=30, server_settings={"timezone": "UTC"} | settings
        )
        try:
            yield conn
        finally:
            conn.terminate()


@asynccontextmanager
async def living(
    guard: Guard,
    dsn: str,
    *,
    seed: int,
    devices: int,
    cluster: Cluster | None = None,
    entry: tuple[str, ...] = REAL,
    habits: Habits | None = None,
) -> AsyncIterator[World]:
    """Run a world for the block: its devices are registered and send, and its daemon serves."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-"))
    guard.report("folder", folder)
    fleet = make_fleet(devices + MANAGED_DEVICES, seed)
    rng = random.Random(f"nexhb front:{seed}")  # noqa: S311 - a simulation
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(Front(rng).serving())
        proxies = [await stack.enter_async_context(Proxy(dsn).serving()) for _ in range(2)]
        journal = await stack.enter_async_context(Journal(folder / "devices.log").open())
        settings = {"NEXHB_ARCHIVE__URL": f"file://{folder}/archive"}
        daemons = []
        for name, proxy in zip("ab", proxies, strict=True):
            (folder / name).mkdir()
            daemon = Daemon(folder / name, guard, settings | {"NEXHB_DATABASE__URL": proxy.dsn}, entry)
            daemons.append(await stack.enter_async_context(daemon.supervised()))
        front.daemons = daemons
        kiosks = [Kiosk(fleet, number, journal, habits or Habits(), seed) for number in range(devices)]
        s3 = await stack.enter_async_context(S3Store(rng).serving())
        managed_devices = ManagedDevices(fleet, devices, journal, seed)
        world = World(
            seed, folder, dsn, cluster, fleet, kiosks, journal, front, proxies, daemons, managed_devices, guard, s3
        )
        await _register_devices(world)
        daemons[0].keep_running()
        making = (kiosk.make() for kiosk in world.kiosks)
        sending = (kiosk.send(world.front.port) for kiosk in world.kiosks)
        async with background.running(*making, *sending), managed_devices.sending(world):
            yield world


async def _register_devices(world: World) -> None:
    text = io.StringIO()
    write_csv([*world.fleet[: len(world.kiosks)], *world.managed_devices.known], text)
    file = world.folder / "fleet.csv"
    file.write_text(text.getvalue())
    async with world.connection() as conn:
        await csv_import.import_csv(conn, file)
