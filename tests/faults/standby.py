"""A standby of a run's PostgreSQL, made by pg_basebackup; it can be killed, started again, kept from receiving, and
promoted in the place of its primary."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from nexhb import embedded, pgaccount
from nexhb.embedded import EmbeddedPostgres
from nexhb.pgaccount import USER
from tests.faults.guard import Guard

READY_S = 20.0
LOOK_S = 0.02
_CAUGHT_UP = "SELECT bool_and(replay_lsn >= $1::text::pg_lsn) FROM pg_stat_replication"


@dataclass(frozen=True)
class Standby:
    """A PostgreSQL that follows another."""

    data_dir: Path
    place: embedded._Place
    sockets: Path

    @property
    def dsn(self) -> str:
        """Its own address."""
        return f"postgresql://{USER}@/{USER}?host={self.sockets}&port=5432"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        log = self.place.log_dir / "start.log"
        self.place.run("pg_ctl", "-D", self.place.pgdata, "-l", log, "-w", "-t", f"{READY_S:.0f}", "start")

    def end(self) -> None:
        """Stop it at once, if it runs, as a crash would."""
        with suppress(Exception):
            self.place.run("pg_ctl", "-D", self.place.pgdata, "-m", "immediate", "-w", "stop")

    def promote(self) -> EmbeddedPostgres:
        """It takes writes from now on, and is served and started again as any cluster of nexhb's."""
        self.place.run("pg_ctl", "-D", self.place.pgdata, "-w", "-t", f"{READY_S:.0f}", "promote")
        return embedded.start(self.data_dir)

    async def caught_up(self, primary: asyncpg.Connection) -> None:
        """Wait until it has replayed all that the primary has. Raises TimeoutError."""
        lsn = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        async with asyncio.timeout(READY_S):
            while not await primary.fetchval(_CAUGHT_UP, lsn):
                await asyncio.sleep(LOOK_S)

    async def receive_nothing(self) -> None:
        """What the primary writes from now on does not arrive. Raises TimeoutError."""
        conn = await asyncpg.connect(self.dsn, timeout=3, command_timeout=5)
        try:
            await conn.execute("ALTER SYSTEM SET primary_conninfo = ''")
            await conn.execute("SELECT pg_reload_conf()")
            async with asyncio.timeout(READY_S):
                while await conn.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(LOOK_S)
        finally:
            conn.terminate()


def make(primary: EmbeddedPostgres, beside: Path, guard: Guard) -> Standby:
    """A standby of that primary, started, in a new folder `beside` it. Raises EmbeddedPostgresError."""
    data_dir = beside / f"standby-{time.monotonic_ns()}"
    account, data_dir = pgaccount.prepare(data_dir)
    bin_dir, _ = pgaccount.find_binaries(primary.pgdata.parent, account)
    place = embedded._Place(data_dir / "pg", bin_dir, account, embedded._Patience(READY_S, embedded._silent))
    guard.tell("postmaster", place.pgdata)
    new = account.new_folder(place.pgdata)
    host = primary.dsn.partition("host=")[2].partition("&")[0]
    place.run("pg_basebackup", "-D", new, "-h", host, "-U", USER, "-R", "-X", "stream", "-c", "fast")
    new.rename(place.pgdata)
    embedded._configure(place)
    standby = Standby(data_dir, place, pgaccount.socket_dir(data_dir, account))
    standby.start()
    return standby
