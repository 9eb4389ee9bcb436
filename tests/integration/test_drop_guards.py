"""The guards before the irreversible steps of a nightly run, each tested with the earlier ones disabled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from nexhb import partitions, retirement
from nexhb.archive import catalog, restore, verify
from nexhb.archive.manifest import Manifest
from nexhb.errors import ArchiveDamaged, JobFailed
from nexhb.jobs.nightly import NightlyRun
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock, held
from tests.conftest import SOON_S
from tests.support.nightly import NOW, OLD, House

NAME = partitions.table_name(OLD)
START = partitions.midnight(OLD)
END = START + timedelta(days=1)
GIVE_UP_LOCK = f"SELECT pg_advisory_unlock({int(Lock.NIGHTLY)})"


@asynccontextmanager
async def holder_of(house: House) -> AsyncIterator[Connection]:
    """Yield a connection that holds the nightly lock, as `retirement.drop` requires."""
    connected = house.database.connected(application="holder", lock_timeout="60000")
    async with connected as conn, held(conn, Lock.NIGHTLY, wait=True):
        yield conn


async def waits_for_a_lock(conn: Connection) -> None:
    """Return once a connection waits for a lock on the day's table."""
    waiting = "SELECT FROM pg_locks WHERE relation = $1::text::regclass AND NOT granted"
    async with asyncio.timeout(SOON_S):
        while not await conn.fetch(waiting, NAME):
            await asyncio.sleep(0.01)


# ---- DROP ------------------------------------------------------------------------------------------------------------

BROKEN = {
    "UPDATE hb_partitions SET state = 'active'": "not archived and detached",
    "UPDATE hb_partitions SET state = 'archive_failed'": "not archived and detached",
    "DELETE FROM hb_partitions": "not archived and detached",
    partitions.attach_statement(NAME, START, END): "not archived and detached",
    f"ALTER TABLE {NAME} DROP CONSTRAINT {NAME}_sealed": "accepted rows again",
    "UPDATE hb_partitions SET row_count = 151": "150 rows, its archive 151",
}


async def test_each_condition_of_a_drop_holds_by_itself(house: House) -> None:
    """A day must be archived, detached, sealed and complete to be dropped; in each case the day meets all of these
    conditions but one."""
    await house.fill(OLD)
    await house.killed_at("recorded")
    async with holder_of(house) as holder:
        for broken, why in BROKEN.items():
            change = holder.transaction()
            await change.start()
            await holder.execute(broken)
            with pytest.raises(ArchiveDamaged, match=why):
                await retirement.drop(holder, NAME, NOW)
            assert await partitions.count_rows(holder, NAME) == 150
            await change.rollback()
        change = holder.transaction()
        await change.start()
        await retirement.drop(holder, NAME, NOW)
        assert not await partitions.table_exists(holder, NAME)
        await change.rollback()
        # The table must be locked before its seal is checked: here another session unseals the table and changes a row,
        # which leaves the count as it was.
        async with house.database.connected(application="hand") as hand, hand.transaction():
            await retirement.unseal(hand, NAME)
            await hand.execute(f"UPDATE {NAME} SET battery_pct = 1 WHERE battery_pct = 2")
            dropping = asyncio.create_task(retirement.drop(holder, NAME, NOW))
            await waits_for_a_lock(house.conn)
        with pytest.raises(ArchiveDamaged, match="accepted rows again"):
            await dropping
    assert await partitions.table_exists(house.conn, NAME)


# ---- the seal --------------------------------------------------------------------------------------------------------


async def test_sealing_a_day_waits_for_active_writers_before_it_moves_late_heartbeats(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a writer could wait for the keys of late heartbeats that the seal has moved, and the seal for the
    writer: a deadlock."""
    await house.fill(OLD)
    await retirement.detach(house.conn, NAME)
    merge = retirement._merge
    seen: list[tuple[list[str], int]] = []

    async def looked_at(conn: Connection, *args: Any) -> int:
        locks = "SELECT mode FROM pg_locks WHERE relation = $1::text::regclass AND pid = pg_backend_pid() AND granted"
        modes = [row["mode"] for row in await conn.fetch(locks, NAME)]
        seen.append((modes, await partitions.count_rows(conn, NAME)))
        return await merge(conn, *args)

    monkeypatch.setattr(retirement, "_merge", looked_at)
    another = f"INSERT INTO {NAME} SELECT * FROM json_populate_record(NULL::{NAME}, $1)"
    row = await house.conn.fetchval(f"SELECT to_jsonb(x) || '{{\"bucket\": 1}}' FROM {NAME} x LIMIT 1")
    async with house.database.connected(application="a writer") as writer, writer.transaction():
        await writer.execute(another, row)
        sealing = asyncio.create_task(retirement.seal(house.conn, NAME, START, END))
        await waits_for_a_lock(writer)
        assert seen == []
    await sealing
    assert seen == [(["AccessExclusiveLock"], 151)]
    assert await retirement.is_sealed(house.conn, NAME)


# ---- the lock --------------------------------------------------------------------------------------------------------


async def test_a_nightly_run_that_lost_its_lock_records_nothing_and_stops(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have started, so the run that lost the lock must neither record what it stored nor continue."""
    await house.fill(OLD)

    async def fail(self: NightlyRun, _step: Any) -> None:
        await self._conn.execute(GIVE_UP_LOCK)
        raise ValueError("something else")

    async with house.context().store() as store, holder_of(house) as holder:
        with monkeypatch.context() as patch:
            patch.setattr(NightlyRun, "_count", fail)
            with pytest.raises(JobFailed, match="something else"):
                await NightlyRun(holder, store, house.context(), NOW).run()
    assert (await house.state(OLD))["state"] == "active"
    assert house.store.puts == []

    read_back = verify.verify
    async with house.context().store() as store, holder_of(house) as holder:

        async def and_lose_the_lock(*args: Any) -> Manifest:
            manifest = await read_back(*args)
            await holder.execute(GIVE_UP_LOCK)
            return manifest

        monkeypatch.setattr(verify, "verify", and_lose_the_lock)
        with pytest.raises(JobFailed):
            await NightlyRun(holder, store, house.context(), NOW).run()
    state = await house.state(OLD)
    assert (state["archive_url"], state["archived_at"]) == (None, None)
    assert await partitions.count_rows(house.conn, NAME) == 150


# ---- drill and restore -----------------------------------------------------------------------------------------------

Loads = Callable[..., Any]


async def test_a_drill_and_a_restore_compare_the_loaded_rows_and_not_only_the_bytes_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that is read is correct, but the loaded rows or the manifest differ from it."""
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    [current] = await catalog.current_archives(house.conn)

    async def drilled(where: Any, what: str, instead: Loads, why: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(where, what, instead)
            with pytest.raises(ArchiveDamaged, match=why):
                await restore.drill(house.conn, house.store, current)

    fill, load = restore._fill, verify.load

    async def changes_a_value(conn: Connection, store: Any, archives: Any, into: Any, spool: Any) -> int:
        rows = await fill(conn, store, archives, into, spool)
        await conn.execute(f"UPDATE {into.qualified} SET temp_c = temp_c + 1 WHERE uptime_s = 7")
        return rows

    def says(**changes: Any) -> Loads:
        async def says_so(*args: Any) -> Manifest:
            return msgspec.structs.replace(await load(*args), **changes)

        return says_so

    assert await restore.drill(house.conn, house.store, current) == 150
    await drilled(restore, "_fill", changes_a_value, "is not what was archived")
    await drilled(verify, "load", says(min_ts=START - timedelta(days=1)), "is not what was archived")
    await drilled(verify, "load", says(max_ts=END + timedelta(days=1)), "is not what was archived")
    await drilled(verify, "load", says(rows=151), "150 rows were restored of 151")

    # A join would omit rows whose labels are missing, and the day would be attached without these rows.
    await house.conn.execute("DELETE FROM heartbeat_labels WHERE network_type = 'wifi'")
    monkeypatch.setattr(restore, "_Q", {**restore._Q, "restore_labels": "SELECT '$table'"})
    with pytest.raises(ArchiveDamaged, match="150 rows were read"):
        await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    assert not await partitions.table_exists(house.conn, NAME)
    assert (await house.state(OLD))["state"] == "dropped"
