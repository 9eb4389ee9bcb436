"""A PostgreSQL of a run's own, on a small disk of its own where that can be had; its postmaster is started again
whenever it ends, as an init system would."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import asyncpg

from nexhb import embedded, migrate
from nexhb.daemon import utc_now
from nexhb.db import Database
from nexhb.errors import NexhbError
from tests.faults import faketime, standby
from tests.faults.guard import Guard
from tests.faults.processes import ended
from tests.faults.standby import Standby

DISK = "768m"
INODES = 30_000  # of which PostgreSQL with its programs takes 6,000
START_S = 60.0


class Cluster:
    """A running PostgreSQL."""

    def __init__(self, folder: Path, guard: Guard, *, small_disk: bool) -> None:
        self._folder = folder
        self.data_dir = folder / "data"
        self.small_disk = small_disk
        self._ballast = folder / "ballast"
        self._files = folder / "files"
        self._server = embedded.start(self.data_dir)
        self._guard = guard
        guard.tell("postmaster", self._server.pgdata)
        self.dsn = self._server.dsn
        self.starts = 1
        self._start = asyncio.Condition()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self.up = asyncio.Event()
        self.up.set()

    @property
    def pid(self) -> int:
        """The postmaster; 0 where there is none."""
        with suppress(OSError, ValueError, IndexError):
            return int((self._server.pgdata / "postmaster.pid").read_text().splitlines()[0])
        return 0

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Cluster]:
        """For the block it is started whenever it is not there."""
        keeper = asyncio.create_task(self._keep())
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await asyncio.to_thread(self._server.stop)

    async def started_again(self, starts: int) -> None:
        """Wait until it was started more than `starts` times."""
        async with self._start:
            await self._start.wait_for(lambda: self.starts > starts)

    def kill(self) -> None:
        """SIGKILL the postmaster; its children notice it by themselves."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """A fast stop, and no start until `may_start`."""
        self._may_start.clear()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGINT)

    def may_start(self) -> None:
        """It may come back."""
        self._may_start.set()

    async def backend(self) -> int:
        """A backend of the daemon's writer; 0 where there is none."""
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            conn = await asyncpg.connect(self.dsn, timeout=3, command_timeout=3)
            try:
                query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb writer' LIMIT 1"
                return int(await conn.fetchval(query) or 0)
            finally:
                conn.terminate()
        return 0

    @asynccontextmanager
    async def by_a_clock_of_its_own(self) -> AsyncIterator[faketime.Clock]:
        """For the block its clock can be stepped: it is started anew with it, and behind the block without."""
        library = faketime.library()
        assert library is not None  # such kinds are drawn only where it is installed
        clock = faketime.Clock(self._folder / "clock", library)
        await asyncio.to_thread(clock.step, timedelta(0))
        try:
            await self._started_by(clock)
            yield clock
        finally:
            pid = self.pid
            await self._started_by(None)
            faketime.clear_away(pid)

    async def _started_by(self, clock: faketime.Clock | None) -> None:
        faketime.goes_by(self.data_dir, clock)
        starts = self.starts
        self.stop()
        self.may_start()
        await self.started_again(starts)

    def make_standby(self) -> Standby:
        """A standby beside it. Raises EmbeddedPostgresError."""
        return standby.make(self._server, self._folder, self._guard)

    async def lose(self) -> None:
        """The postmaster ends at once, and does not come back until `may_start` or `give_way`."""
        self._may_start.clear()
        if pid := self.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
            await ended(pid)

    async def give_way(self, to: Standby) -> None:
        """Once it is lost, the standby takes its place for good."""
        lost, self._server = self._server, await asyncio.to_thread(to.promote)
        await asyncio.to_thread(lost.stop)  # it is gone: this gives up the claim on its folder
        self.data_dir, self.dsn = to.data_dir, self._server.dsn
        self._may_start.set()

    def fill_disk(self) -> None:
        """Not a byte is left."""
        file = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for block in (b"\0" * (1 << 24), b"\0" * (1 << 12)):
            with suppress(OSError):
                while os.write(file, block) == len(block):
                    pass
        os.close(file)

    def free_disk(self) -> None:
        """There is room again."""
        self._ballast.unlink(missing_ok=True)

    def fill_inodes(self) -> None:
        """Not a file more can be made."""
        self._files.mkdir(exist_ok=True)
        with suppress(OSError):
            for number in range(INODES):
                os.close(os.open(self._files / f"{number}", os.O_WRONLY | os.O_CREAT, 0o600))

    def free_inodes(self) -> None:
        """Files can be made again."""
        shutil.rmtree(self._files, ignore_errors=True)

    async def _keep(self) -> None:
        while True:
            if pid := self.pid:
                await ended(pid)
            self.up.clear()
            await self._may_start.wait()
            with suppress(NexhbError, OSError):
                if self._server.alive:  # another one has taken its place
                    self.up.set()
                    continue
                await asyncio.to_thread(self._server.stop)
                self._server = await asyncio.to_thread(embedded.start, self.data_dir, start_timeout_s=START_S)
                self.starts += 1
                self.up.set()
                async with self._start:
                    self._start.notify_all()
                continue
            await asyncio.sleep(0.2)  # the disk is full


@asynccontextmanager
async def running(guard: Guard, template: Path | None = None) -> AsyncIterator[Cluster]:
    """A cluster for the block, with nexhb's schema: a copy of the stopped one in `template`, or a new one."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-pg-"))
    guard.tell("folder", folder)
    small = await asyncio.to_thread(_mount, folder)
    if small:
        guard.tell("mount", folder)
    if template is not None:
        await asyncio.to_thread(_copy, template, folder / "data")
    cluster = await asyncio.to_thread(Cluster, folder, guard, small_disk=small)
    async with cluster.kept():
        if template is None:
            conn = await Database(cluster.dsn).connect(application="faults")
            await migrate.migrate(conn, utc_now())
            await conn.close()
        yield cluster


@asynccontextmanager
async def stopped(guard: Guard) -> AsyncIterator[Path]:
    """The folder of a cluster with nexhb's schema that does not run, to be copied during the block."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-pg-"))
    guard.tell("folder", folder)
    await asyncio.to_thread(folder.chmod, 0o711)  # as root, PostgreSQL's own user must pass
    server = await asyncio.to_thread(embedded.start, folder / "data")
    try:
        guard.tell("postmaster", server.pgdata)
        conn = await Database(server.dsn).connect(application="faults")
        await migrate.migrate(conn, utc_now())
        await conn.close()
    finally:
        await asyncio.to_thread(server.stop)
    yield folder / "data"


def _copy(template: Path, data_dir: Path) -> None:
    """Owners and modes too; the copy's own paths are written at its start."""
    subprocess.run(["cp", "-a", "--reflink=auto", template, data_dir], check=True)


def _mount(folder: Path) -> bool:
    """A disk that can be filled; only root can have one."""
    folder.chmod(0o711)  # as root, PostgreSQL's own user must pass
    if os.geteuid() != 0:
        return False
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},nr_inodes={INODES},mode=711", "nexhb-faults", folder],
        check=False,
        capture_output=True,
    )
    return done.returncode == 0


async def until_up(cluster: Cluster, bound_s: float) -> float:
    """Wait until it takes connections; the seconds. Raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(bound_s):
        while True:
            await cluster.up.wait()
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                conn = await asyncpg.connect(cluster.dsn, timeout=3)
                conn.terminate()
                return time.monotonic() - began
            await asyncio.sleep(0.05)
