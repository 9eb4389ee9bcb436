"""A streaming standby of a cluster of the fault tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg

from nexhb.postgres.account import USER, find_binaries, prepare
from tests.faults.cluster import Cluster
from tests.faults.guard import Guard


class Standby:
    """A standby that is copied from its primary and then receives the primary's WAL."""

    def __init__(self, primary: Cluster, folder: Path, name: str) -> None:
        folder.chmod(0o711)  # so that PostgreSQL's user can enter it when the tests run as root
        self.name = name
        self._account, self._folder = prepare(folder / "data")
        self.pgdata = self._account.own_folder(self._folder / "pg")
        self._sockets = self._account.own_folder(self._folder / "sockets")
        self._bin, _ = find_binaries(self._folder, self._account)
        host = parse_qs(urlsplit(primary.dsn).query)["host"][0]
        self._account.run(
            self._bin / "pg_basebackup", "-D", self.pgdata, "-R", "-X", "stream", "-c", "fast", "--no-sync",
            "-d", f"host={host} port=5432 user={USER} application_name={name}",
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.dsn = f"postgresql://{USER}@/{USER}?host={self._sockets}&port=5432"

    async def start(self) -> None:
        """Start the standby, and wait until it accepts reads."""
        self._process = subprocess.Popen(  # noqa: ASYNC220 - starting it does not block
            [
                self._bin / "postgres", "-D", self.pgdata, "-c", f"unix_socket_directories={self._sockets}",
                "-c", f"cluster_name={self.name}", "-c", "logging_collector=off",
                "-c", "synchronous_standby_names=",
            ],
            **self._account.popen(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(60):
            while True:
                with suppress(OSError, asyncpg.PostgresError):
                    (await asyncpg.connect(self.dsn, timeout=3)).terminate()
                    return
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Stop the standby by a fast shutdown."""
        process, self._process = self._process, None
        if process is not None:
            os.kill(process.pid, signal.SIGINT)
            await asyncio.to_thread(process.wait, 60)

    async def stop_receiving(self) -> None:
        """Stop receiving WAL."""
        conn = await asyncpg.connect(self.dsn)
        await conn.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await conn.execute("SELECT pg_reload_conf()")
        async with asyncio.timeout(60):
            while await conn.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                await asyncio.sleep(0.02)
        conn.terminate()

    async def promote(self) -> None:
        """Promote the standby to a primary."""
        conn = await asyncpg.connect(self.dsn)
        assert await conn.fetchval("SELECT pg_promote(true, 60)")
        conn.terminate()


@asynccontextmanager
async def standby_of(primary: Cluster, guard: Guard, name: str = "standby1") -> AsyncIterator[Standby]:
    """Run a standby for the block."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-standby-"))
    guard.report("folder", folder)
    standby = await asyncio.to_thread(Standby, primary, folder, name)
    guard.report("postmaster", standby.pgdata)
    await standby.start()
    try:
        yield standby
    finally:
        await standby.stop()
