"""The nightly run on a database and a folder of archives, whose store a test can break, or whose run it can kill."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from nexhb import partitions, retirement
from nexhb.archive import catalog, verify
from nexhb.archive.file import FolderStore
from nexhb.errors import StoreError
from nexhb.jobs import nightly, plan, runner
from nexhb.jobs.nightly import NightlyContext
from nexhb.jobs.runner import JobRun
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from tests.conftest import ADMIN_KEY, NIGHT, Nexhb

NOW = NIGHT
RULES = plan.NightlyRules(retention_days=90, days_ahead=14, accept_past=timedelta(days=7))
OLD = NOW.date() - timedelta(days=91)


class Killed(BaseException):
    """The exception that stands for SIGKILL."""


class Faulty:
    """A store that works until the test makes it fail."""

    def __init__(self, store: FolderStore) -> None:
        self.store = store
        self.refuse = ""  # a put of a name that contains this fails
        self.rot: Callable[[str, bytes], bytes] = lambda _name, chunk: chunk
        self.puts: list[str] = []
        self.url, self.name_of = store.url, store.name_of

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store the object, or fail."""
        if self.refuse and self.refuse in name:
            raise StoreError("The disk is full.")
        await self.store.put(name, body, sha256, overwrite=overwrite)
        self.puts.append(name)

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield the object's bytes, which the test may have changed."""
        async for chunk in self.store.get(name):
            yield self.rot(name, chunk)


class House:
    """A database and an archive folder, with the nightly run."""

    def __init__(self, database: Database, conn: Connection, folder: Path) -> None:
        self.database, self.conn, self.folder = database, conn, folder
        self.store = Faulty(FolderStore(folder / "archive", timeout_s=30))
        self.rules = RULES
        self.at: Callable[[str], None] = nightly.no_checkpoint

    def context(self) -> NightlyContext:
        """Return the context of a run."""

        @asynccontextmanager
        async def store() -> AsyncIterator[Faulty]:
            yield self.store

        chance = random.Random(1)  # noqa: S311 - chooses the day of a drill, which is no secret
        return NightlyContext(self.rules, store, self.folder / "spool", chance, self.at)

    async def nightly(self, now: datetime = NOW) -> JobRun:
        """Run the nightly job."""
        return await runner.run(self.database, nightly.nightly_job(self.context()), now)

    async def killed_at(self, point: str) -> None:
        """Run the nightly job and kill it at this checkpoint."""

        def kill(reached: str) -> None:
            if reached == point:
                raise Killed

        self.at = kill
        conn = await self.database.connect(application="killed", lock_timeout="2000")
        try:
            async with self.context().store() as store, held(conn, Lock.NIGHTLY, wait=False):
                try:
                    await nightly.NightlyRun(conn, store, self.context(), NOW).run()
                except Killed:
                    conn.terminate()  # so that no `finally` can reach the database
                    raise
        except Killed:
            return
        finally:
            self.at = nightly.no_checkpoint
        raise AssertionError(f"{point} was never reached")

    async def fill(self, day: date, devices: int = 3, rows: int = 50) -> None:
        """Create a day with heartbeats."""
        await partitions.ensure(self.conn, [day])
        await self.conn.execute(
            """
            INSERT INTO devices (device_id) SELECT 'device ' || n FROM generate_series(1, $1::int) n
            ON CONFLICT DO NOTHING""",
            devices,
        )
        await self.conn.execute(
            """
            INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
            VALUES ('1.0', '', 'wifi', E'a "quoted",\nname'), ('1.0', '2.0', '', '') ON CONFLICT DO NOTHING"""
        )
        await self.conn.execute(
            """
            INSERT INTO device_heartbeats
            SELECT $1::timestamptz + n * interval '60.123457 s', $1::timestamptz + n * interval '61 s', d.device_no,
                   extract(epoch FROM $1::timestamptz)::int - 1577836800 + n * 60, l.label_no,
                   n, NULL, 0.1::real + n, n % 100, -n, n % 2 = 0, NULL, n % 7 = 0, '10.0.0.1'::inet
            FROM generate_series(0, $2::int - 1) n, devices d, heartbeat_labels l
            WHERE l.label_no = 1 + n % 2""",
            partitions.midnight(day),
            rows,
        )

    async def state(self, day: date) -> Any:
        """Return the day's row of hb_partitions."""
        return await self.conn.fetchrow("SELECT * FROM hb_partitions WHERE range_start::date = $1", day)

    async def archived(self, day: date) -> list[list[str]]:
        """Return the rows of the day's archives, as texts."""
        result: list[list[str]] = []
        for one in await catalog.find(self.conn, day):
            manifest = await verify.load(self.store, self.store.name_of(one.url), one.sha256)
            async for rows in verify.rows(self.store, manifest):
                result += rows
        return result

    async def rows(self, day: date) -> list[Any]:
        """Return the day's rows, with the names of their device and labels, in key order."""
        return await self.conn.fetch(
            """SELECT * FROM heartbeat_history WHERE ts >= $1 AND ts < $1 + interval '1 day'
               ORDER BY device_no, bucket""",
            partitions.midnight(day),
        )


async def gone(nexhb: Nexhb, conn: Connection, moment: datetime) -> None:
    """Detach and seal the day, as the nightly job does."""
    name, start = partitions.table_name(moment.date()), partitions.midnight(moment.date())
    await retirement.detach(conn, name)
    await retirement.seal(conn, name, start, start + timedelta(days=1))


async def run_nightly(nexhb: Nexhb, status: int = 200) -> dict[str, object]:
    async with nexhb.http.post(f"{nexhb.url}/ops/nightly", headers={"x-admin": ADMIN_KEY}) as response:
        body: dict[str, object] = await response.json()
        assert response.status == status, body
        return body
