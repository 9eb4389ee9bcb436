"""All that a run consists of: devices, the lines between them and the daemons, daemons, the lines to the database, the
database; and which of it is broken just now."""

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
from nexhb import devices as store
from tests.faults.bucket import Bucket
from tests.faults.cluster import Cluster
from tests.faults.daemon import Daemon
from tests.faults.devices import Habits, Kiosk
from tests.faults.guard import Guard
from tests.faults.guests import GUESTS, Guests
from tests.faults.record import Record
from tests.proxy import Proxy, Relay, Streams

REAL = ("-m", "nexhb")


class Front(Relay):
    """Between the devices and whichever daemons run."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.daemons: list[Daemon] = []
        self._closed = 0

    @contextmanager
    def closed(self) -> Iterator[None]:
        """For the block no device reaches a daemon, whatever else happens to its lines."""
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
    """Everything, by name."""

    seed: int
    folder: Path
    dsn: str
    cluster: Cluster | None  # None: the database is somebody else's, and only what lies before it is broken
    fleet: Sequence[Device]
    kiosks: list[Kiosk]
    record: Record
    front: Front
    proxies: list[Proxy]
    daemons: list[Daemon]  # the second one runs only now and then
    guests: Guests
    guard: Guard
    bucket: Bucket  # an S3 beside the folder
    blamed: list[tuple[str, str]] = field(default_factory=list)  # what a fault found broken: by which word, and how
    # From a copy of the database until it took the place of its original: what was acknowledged between may be gone.
    forgiven: list[tuple[float, float]] = field(default_factory=list)
    apart: int = 0  # faults under way in which daemon and database may not hear each other
    together_since_s: float = 0.0  # the end of the last of them, on the machine's monotonic clock

    @property
    def archive(self) -> str:
        """The folder of the archives."""
        return f"{self.folder}/archive"

    @property
    def port(self) -> int:
        """Where devices send."""
        return self.front.port

    @property
    def together_s(self) -> float:
        """Since when daemon and database hear each other; infinity while they may not."""
        return math.inf if self.apart else self.together_since_s

    @property
    def processes(self) -> frozenset[int]:
        """The daemons that run."""
        return frozenset(daemon.pid for daemon in self.daemons if daemon.pid)

    def blame(self, what: str, why: str) -> None:
        """Write down what does not hold while something is broken, and should."""
        self.blamed.append((what, why))

    @property
    def waiting(self) -> int:
        """Requests without an answer."""
        return sum(kiosk.waiting for kiosk in self.kiosks)

    @property
    def held(self) -> int:
        """Heartbeats that devices hold."""
        return sum(kiosk.held for kiosk in self.kiosks)

    @asynccontextmanager
    async def connection(self, **settings: str) -> AsyncIterator[asyncpg.Connection]:
        """One of one's own, past the proxies."""
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
    command: tuple[str, ...] = REAL,
    habits: Habits | None = None,
) -> AsyncIterator[World]:
    """A world for the block: its devices are known and send, its daemon serves."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-"))
    guard.tell("folder", folder)
    fleet = make_fleet(devices + GUESTS, seed)
    rng = random.Random(f"nexhb front:{seed}")  # noqa: S311 - a simulation
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(Front(rng).serving())
        proxies = [await stack.enter_async_context(Proxy(dsn).serving()) for _ in range(2)]
        record = await stack.enter_async_context(Record(folder / "devices.log").open())
        settings = {"NEXHB_ARCHIVE__URL": f"file://{folder}/archive"}
        daemons = []
        for name, proxy in zip("ab", proxies, strict=True):
            (folder / name).mkdir()
            daemon = Daemon(folder / name, guard, settings | {"NEXHB_DATABASE__URL": proxy.dsn}, command)
            daemons.append(await stack.enter_async_context(daemon.kept()))
        front.daemons = daemons
        kiosks = [Kiosk(fleet, number, record, habits or Habits(), seed) for number in range(devices)]
        bucket = await stack.enter_async_context(Bucket(rng).serving())
        guests = Guests(fleet, devices, record, seed)
        world = World(seed, folder, dsn, cluster, fleet, kiosks, record, front, proxies, daemons, guests, guard, bucket)
        await _make_known(world)
        daemons[0].want()
        async with _sending(world), guests.sending(world):
            yield world


async def _make_known(world: World) -> None:
    text = io.StringIO()
    write_csv([*world.fleet[: len(world.kiosks)], *world.guests.known], text)
    file = world.folder / "fleet.csv"
    file.write_text(text.getvalue())
    async with world.connection() as conn:
        await store.import_csv(conn, file)


@asynccontextmanager
async def _sending(world: World) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(kiosk.make()) for kiosk in world.kiosks]
    tasks += [asyncio.create_task(kiosk.send(world.front.port)) for kiosk in world.kiosks]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception):
                raise error
