"""A PostgreSQL for one run, on a small disk of its own if such a disk can be mounted. The postmaster is restarted
whenever it ends, as an init system would do."""

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

from nexhb.clock import system_now
from nexhb.errors import NexhbError
from nexhb.postgres import embedded, migrate
from nexhb.postgres.connections import Database
from tests.faults import faketime, standby
from tests.faults.guard import Guard
from tests.faults.processes import wait_for_exit
from tests.faults.standby import Standby

DISK = "768m"
INODES = 30_000  # PostgreSQL with its programs uses 6,000 inodes
START_S = 60.0


class Cluster:
    """A PostgreSQL cluster that is running, or is about to be restarted."""

    def __init__(self, folder: Path, guard: Guard, *, small_disk: bool) -> None:
        self._folder = folder
        self.data_dir = folder / "data"
        self.small_disk = small_disk
        self._filler = folder / "filler"
        self._files = folder / "files"
        self._server = embedded.start(self.data_dir)
        self._guard = guard
        guard.report("postmaster", self._server.pgdata)
        self.dsn = self._server.dsn
        self.starts = 1
        self._start = asyncio.Condition()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self.up = asyncio.Event()
        self.up.set()

    @property
    def pid(self) -> int:
        """The process ID of the postmaster; 0 if there is none."""
        with suppress(OSError, ValueError, IndexError):
            return int((self._server.pgdata / "postmaster.pid").read_text().splitlines()[0])
        return 0

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[Cluster]:
        """For the block, start the cluster whenever it is not running; stop it afterwards."""
        supervisor = asyncio.create_task(self._supervise())
        try:
            yield self
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            await asyncio.to_thread(self._server.stop)

    async def wait_for_restart(self, starts: int) -> None:
        """Wait until the cluster was started more than `starts` times."""
        async with self._start:
            await self._start.wait_for(lambda: self.starts > starts)

    def kill(self) -> None:
        """Send SIGKILL to the postmaster; its children notice by themselves that it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def restart_if_unreachable(self, timeout_s: float) -> None:
        """Kill the postmaster unless the cluster accepts a connection within this time. If PostgreSQL 18 crashed while
        no file could be created, its postmaster may wait forever for a startup process that has ended. This was seen
        on a busy machine; an operator would restart PostgreSQL."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                conn = await asyncpg.connect(self.dsn, timeout=3)
                conn.terminate()
                return
            await asyncio.sleep(0.1)
        starts = self.starts
        self.kill()
        await self.wait_for_restart(starts)

    def stop(self) -> None:
        """Shut the cluster down (fast), and do not restart it until `may_start` is called."""
        self._may_start.clear()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGINT)

    def may_start(self) -> None:
        """Let the cluster be started again."""
        self._may_start.set()

    async def backend(self) -> int:
        """Return the process ID of a backend of the daemon's writer; 0 if there is none."""
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            conn = await asyncpg.connect(self.dsn, timeout=3, command_timeout=3)
            try:
                query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb writer' LIMIT 1"
                return int(await conn.fetchval(query) or 0)
            finally:
                conn.terminate()
        return 0

    @asynccontextmanager
    async def with_own_clock(self) -> AsyncIterator[faketime.Clock]:
        """For the block, give the cluster a clock that can be stepped: it is restarted with that clock, and after the
        block without it."""
        library = faketime.library()
        assert library is not None  # a schedule has faults that need the library only if it is installed
        clock = faketime.Clock(self._folder / "clock", library)
        await asyncio.to_thread(clock.step, timedelta(0))
        try:
            await self._restart_with(clock)
            yield clock
        finally:
            pid = self.pid
            await self._restart_with(None)
            faketime.remove_files(pid)

    async def _restart_with(self, clock: faketime.Clock | None) -> None:
        faketime.use_clock(self.data_dir, clock)
        starts = self.starts
        self.stop()
        self.may_start()
        await self.wait_for_restart(starts)

    def make_standby(self) -> Standby:
        """Create a standby of this cluster and return it. Raises EmbeddedPostgresError."""
        return standby.make(self._server, self._folder, self._guard)

    async def crash(self) -> None:
        """Shut the cluster down (immediate), and do not restart it until `may_start` or `replace_with` is called."""
        self._may_start.clear()
        if pid := self.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
            await wait_for_exit(pid)

    async def replace_with(self, standby: Standby) -> None:
        """Promote the standby, which replaces the crashed cluster for good."""
        crashed, self._server = self._server, await asyncio.to_thread(standby.promote)
        await asyncio.to_thread(crashed.stop)  # the crashed postmaster has ended: this releases the claim on its folder
        self.data_dir, self.dsn = standby.data_dir, self._server.dsn
        self._may_start.set()

    def fill_disk(self) -> None:
        """Fill the disk to the last byte."""
        file = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for block in (b"\0" * (1 << 24), b"\0" * (1 << 12)):
            with suppress(OSError):
                while os.write(file, block) == len(block):
                    pass
        os.close(file)

    def free_disk(self) -> None:
        """Delete the file that fills the disk."""
        self._filler.unlink(missing_ok=True)

    def fill_inodes(self) -> None:
        """Use up the inodes, so that no further file can be created."""
        self._files.mkdir(exist_ok=True)
        with suppress(OSError):
            for number in range(INODES):
                os.close(os.open(self._files / f"{number}", os.O_WRONLY | os.O_CREAT, 0o600))

    def free_inodes(self) -> None:
        """Delete the files that use up the inodes."""
        shutil.rmtree(self._files, ignore_errors=True)

    async def _supervise(self) -> None:
        while True:
            if pid := self.pid:
                await wait_for_exit(pid)
            self.up.clear()
            await self._may_start.wait()
            with suppress(NexhbError, OSError):
                if self._server.alive:  # a promoted standby has replaced the cluster
                    self.up.set()
                    continue
                await asyncio.to_thread(self._server.stop)
                self._server = await asyncio.to_thread(embedded.start, self.data_dir, start_timeout_s=START_S)
                self.starts += 1
                self.up.set()
                async with self._start:
                    self._start.notify_all()
                continue
            await asyncio.sleep(0.2)  # the start failed, for example because the disk is full


@asynccontextmanager
async def running(guard: Guard, template: Path | None = None) -> AsyncIterator[Cluster]:
    """Run a cluster with nexhb's schema for the block: a copy of the stopped cluster in `template`, or a new one."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-pg-"))
    guard.report("folder", folder)
    small = await asyncio.to_thread(_mount, folder)
    if small:
        guard.report("mount", folder)
    if template is not None:
        await asyncio.to_thread(_copy, template, folder / "data")
    cluster = await asyncio.to_thread(Cluster, folder, guard, small_disk=small)
    async with cluster.supervised():
        if template is None:
            conn = await Database(cluster.dsn).connect(application="faults")
            await migrate.migrate(conn, system_now())
            await conn.close()
        yield cluster


@asynccontextmanager
async def stopped(guard: Guard) -> AsyncIterator[Path]:
    """Create a cluster with nexhb's schema, stop it, and yield its data directory, to be copied during the block."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-pg-"))
    guard.report("folder", folder)
    await asyncio.to_thread(folder.chmod, 0o711)  # if root runs this, PostgreSQL's own user needs access
    server = await asyncio.to_thread(embedded.start, folder / "data")
    try:
        guard.report("postmaster", server.pgdata)
        conn = await Database(server.dsn).connect(application="faults")
        await migrate.migrate(conn, system_now())
        await conn.close()
    finally:
        await asyncio.to_thread(server.stop)
    yield folder / "data"


def _copy(template: Path, data_dir: Path) -> None:
    """Copy a data directory with its owners and modes; paths in it are rewritten when the copy is started."""
    subprocess.run(["cp", "-a", "--reflink=auto", template, data_dir], check=True)


def _mount(folder: Path) -> bool:
    """Mount a small disk, which can be filled, and return whether that succeeded; only root can mount one."""
    folder.chmod(0o711)  # if root runs this, PostgreSQL's own user needs access
    if os.geteuid() != 0:
        return False
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},nr_inodes={INODES},mode=711", "nexhb-faults", folder],
        check=False,
        capture_output=True,
    )
    return done.returncode == 0


async def until_up(cluster: Cluster, timeout_s: float) -> float:
    """Wait until the cluster accepts connections, and return how many seconds that took. Raises TimeoutError after
    `timeout_s` seconds."""
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while True:
            await cluster.up.wait()
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                conn = await asyncpg.connect(cluster.dsn, timeout=3)
                conn.terminate()
                return time.monotonic() - began
            await asyncio.sleep(0.05)
