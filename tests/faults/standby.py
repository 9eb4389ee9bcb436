"""A standby of a run's PostgreSQL, created by pg_basebackup. It can be killed, restarted, kept from receiving WAL, and
promoted in place of its primary."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from nexhb.postgres import account as pg_account
from nexhb.postgres import cluster_files, embedded, sharing
from nexhb.postgres.account import USER
from nexhb.postgres.embedded import EmbeddedPostgres
from tests.faults.guard import Guard

READY_S = 20.0
POLL_S = 0.02
_CAUGHT_UP = "SELECT bool_and(replay_lsn >= $1::text::pg_lsn) FROM pg_stat_replication"


@dataclass(frozen=True)
class Standby:
    """A PostgreSQL that replicates from a primary."""

    data_dir: Path
    cluster: cluster_files.Cluster
    sockets: Path

    @property
    def dsn(self) -> str:
        """Return the DSN of the standby."""
        return f"postgresql://{USER}@/{USER}?host={self.sockets}&port=5432"

    def start(self) -> None:
        """Start the standby, and wait until it accepts connections."""
        log = self.cluster.log_dir / "start.log"
        self.cluster.run("pg_ctl", "-D", self.cluster.pgdata, "-l", log, "-w", "-t", f"{READY_S:.0f}", "start")

    def crash(self) -> None:
        """Stop the standby in the mode `immediate`, as a crash would, if it is running."""
        with suppress(Exception):
            self.cluster.run("pg_ctl", "-D", self.cluster.pgdata, "-m", "immediate", "-w", "stop")

    def promote(self) -> EmbeddedPostgres:
        """Promote the standby, so that it accepts writes, and return it as an embedded cluster of nexhb."""
        self.cluster.run("pg_ctl", "-D", self.cluster.pgdata, "-w", "-t", f"{READY_S:.0f}", "promote")
        return embedded.start(self.data_dir)

    async def catch_up(self, primary: asyncpg.Connection) -> None:
        """Wait until the standby has replayed all WAL of the primary. Raises TimeoutError."""
        lsn = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        async with asyncio.timeout(READY_S):
            while not await primary.fetchval(_CAUGHT_UP, lsn):
                await asyncio.sleep(POLL_S)

    async def stop_receiving(self) -> None:
        """Stop the standby from receiving what the primary writes from now on. Raises TimeoutError."""
        conn = await asyncpg.connect(self.dsn, timeout=3, command_timeout=5)
        try:
            await conn.execute("ALTER SYSTEM SET primary_conninfo = ''")
            await conn.execute("SELECT pg_reload_conf()")
            async with asyncio.timeout(READY_S):
                while await conn.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(POLL_S)
        finally:
            conn.terminate()


def make(primary: EmbeddedPostgres, parent: Path, guard: Guard) -> Standby:
    """Create and start a standby of the primary, in a new folder in `parent`. Raises EmbeddedPostgresError."""
    data_dir = parent / f"standby-{time.monotonic_ns()}"
    account, data_dir = pg_account.prepare(data_dir)
    bin_dir, _ = pg_account.find_binaries(primary.pgdata.parent, account)
    cluster = cluster_files.Cluster(data_dir / "pg", bin_dir, account, sharing.Deadline(READY_S, sharing.no_log))
    guard.report("postmaster", cluster.pgdata)
    new = account.new_folder(cluster.pgdata)
    host = primary.dsn.partition("host=")[2].partition("&")[0]
    cluster.run("pg_basebackup", "-D", new, "-h", host, "-U", USER, "-R", "-X", "stream", "-c", "fast")
    new.rename(cluster.pgdata)
    cluster_files.configure(cluster)
    standby = Standby(data_dir, cluster, pg_account.socket_dir(data_dir, account))
    standby.start()
    return standby
