"""The nightly run over real days: made ahead, archived, verified, dropped, each step able to fail alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nexhb import partitions
from nexhb.archive import catalog, restore, verify
from nexhb.archive.file import FolderStore
from nexhb.archive.store import Store
from nexhb.db import Connection, Database
from nexhb.jobs import nightly, plan, runner
from nexhb.jobs.nightly import Means
from nexhb.jobs.runner import Run

NOW = datetime(2026, 6, 15, 3, 0, tzinfo=UTC)
RULES = plan.Rules(retention_days=90, days_ahead=14, accept_past=timedelta(days=7))


class House:
    """A database and an archive folder, and the nightly run over them."""

    def __init__(self, database: Database, conn: Connection, folder: Path) -> None:
        self.database, self.conn, self.folder = database, conn, folder
        self.store: Store = FolderStore(folder / "archive", timeout_s=30)
        self.rules = RULES
        self.at: Callable[[str], None] = lambda _: None

    async def nightly(self, now: datetime = NOW) -> Run:
        """One run."""

        @asynccontextmanager
        async def store() -> Any:
            yield self.store

        means = Means(self.rules, store, self.folder / "spool", random.Random(1), self.at)  # noqa: S311 - which day is drilled is no secret
        return await runner.run(self.database, nightly.job(means), now)

    async def fill(self, day: date, devices: int = 3, rows: int = 50) -> None:
        """A day with its heartbeats."""
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
        """Its row of hb_partitions."""
        return await self.conn.fetchrow("SELECT * FROM hb_partitions WHERE range_start::date = $1", day)

    async def rows(self, day: date) -> list[Any]:
        """A day's rows, everything spelled out, in the order of the key."""
        return await self.conn.fetch(
            """SELECT * FROM heartbeat_history WHERE ts >= $1 AND ts < $1 + interval '1 day'
               ORDER BY device_no, bucket""",
            partitions.midnight(day),
        )


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


async def test_an_old_day_is_archived_verified_dropped_and_comes_back_equal_row_by_row(house: House) -> None:
    old = NOW.date() - timedelta(days=91)
    await house.fill(old)
    before = await house.rows(old)
    assert len(before) == 150

    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["archived"] == run.counts["dropped"] == run.counts["drilled"] == 1
    state = await house.state(old)
    assert (state["state"], state["row_count"]) == ("dropped", 150)
    assert not await partitions.present(house.conn, partitions.name_of(old))

    [archived] = await catalog.find(house.conn, old)
    manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256)
    assert (manifest.rows, manifest.min_ts, manifest.max_ts) == (150, before[0]["ts"], max(r["ts"] for r in before))

    assert await restore.restore_day(house.conn, house.store, [archived], NOW) == 150
    assert await house.rows(old) == before
    assert (await house.nightly()).status == "completed"
    assert await house.rows(old) == before  # restored: kept until it is released
