"""What stands before the steps of a night that cannot be taken back: each guard with those before it out of the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from nexhb import partitions
from nexhb.archive import catalog, restore, verify
from nexhb.archive.manifest import Manifest
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged, JobFailed
from nexhb.jobs.nightly import Night
from nexhb.locks import Lock, held
from tests.conftest import SOON_S
from tests.integration.test_nightly import NOW, OLD, House, house

__all__ = ["house"]  # a fixture
NAME = partitions.name_of(OLD)
START = partitions.midnight(OLD)
END = START + timedelta(days=1)
GIVE_UP_LOCK = f"SELECT pg_advisory_unlock({int(Lock.NIGHTLY)})"


@asynccontextmanager
async def holder_of(house: House) -> AsyncIterator[Connection]:
    """A connection that holds the nightly lock, as `partitions.drop` takes one."""
    connected = house.database.connected(application="holder", lock_timeout="60000")
    async with connected as conn, held(conn, Lock.NIGHTLY, wait=True):
        yield conn


async def waits_for_a_lock(conn: Connection) -> None:
    """Return once somebody waits for a lock on the day's table."""
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
    f"ALTER TABLE {NAME} DROP CONSTRAINT {NAME}_sealed": "took rows again",
    "UPDATE hb_partitions SET row_count = 151": "150 rows, its archive 151",
}


async def test_each_condition_of_a_drop_holds_by_itself(house: House) -> None:
    """Of a day that is archived, detached, sealed and whole, and then each time in all but one."""
    await house.fill(OLD)
    await house.killed_at("recorded")
    async with holder_of(house) as holder:
        for broken, why in BROKEN.items():
            change = holder.transaction()
            await change.start()
            await holder.execute(broken)
            with pytest.raises(ArchiveDamaged, match=why):
                await partitions.drop(holder, NAME, NOW)
            assert await partitions.count(holder, NAME) == 150
            await change.rollback()
        change = holder.transaction()
        await change.start()
        await partitions.drop(holder, NAME, NOW)
        assert not await partitions.present(holder, NAME)
        await change.rollback()
        # The table is locked before its seal is looked at: somebody takes that off and changes a row; the count agrees.
        async with house.database.connected(application="hand") as hand, hand.transaction():
            await partitions.unseal(hand, NAME)
            await hand.execute(f"UPDATE {NAME} SET battery_pct = 1 WHERE battery_pct = 2")
            dropping = asyncio.create_task(partitions.drop(holder, NAME, NOW))
            await waits_for_a_lock(house.conn)
        with pytest.raises(ArchiveDamaged, match="took rows again"):
            await dropping
    assert await partitions.present(house.conn, NAME)


# ---- the seal --------------------------------------------------------------------------------------------------------


async def test_a_seal_waits_for_the_writers_that_have_begun_before_it_brings_anything_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that came between would wait for the keys of the late heartbeats, and the seal for the writer."""
    await house.fill(OLD)
    await partitions.detach(house.conn, NAME)
    merge = partitions._merge
    seen: list[tuple[list[str], int]] = []

    async def looked_at(conn: Connection, *args: Any) -> int:
        locks = "SELECT mode FROM pg_locks WHERE relation = $1::text::regclass AND pid = pg_backend_pid() AND granted"
        modes = [row["mode"] for row in await conn.fetch(locks, NAME)]
        seen.append((modes, await partitions.count(conn, NAME)))
        return await merge(conn, *args)

    monkeypatch.setattr(partitions, "_merge", looked_at)
    another = f"INSERT INTO {NAME} SELECT * FROM json_populate_record(NULL::{NAME}, $1)"
    row = await house.conn.fetchval(f"SELECT to_jsonb(x) || '{{\"bucket\": 1}}' FROM {NAME} x LIMIT 1")
    async with house.database.connected(application="a writer") as writer, writer.transaction():
        await writer.execute(another, row)
        sealing = asyncio.create_task(partitions.seal(house.conn, NAME, START, END))
        await waits_for_a_lock(writer)
        assert seen == []
    await sealing
    assert seen == [(["AccessExclusiveLock"], 151)]
    assert await partitions.is_sealed(house.conn, NAME)


# ---- the lock --------------------------------------------------------------------------------------------------------


async def test_a_night_without_its_lock_writes_nothing_down_and_goes_no_further(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have begun: what this one has stored is not for it to record, nor is its next step."""
    await house.fill(OLD)

    async def fail(self: Night, _step: Any) -> None:
        await self._conn.execute(GIVE_UP_LOCK)
        raise ValueError("something else")

    async with house.means().store() as store, holder_of(house) as holder:
        with monkeypatch.context() as patch:
            patch.setattr(Night, "_count", fail)
            with pytest.raises(JobFailed, match="something else"):
                await Night(holder, store, house.means(), NOW).run()
    assert (await house.state(OLD))["state"] == "active"
    assert house.store.puts == []

    read_back = verify.verify
    async with house.means().store() as store, holder_of(house) as holder:

        async def and_lose_the_lock(*args: Any) -> Manifest:
            manifest = await read_back(*args)
            await holder.execute(GIVE_UP_LOCK)
            return manifest

        monkeypatch.setattr(verify, "verify", and_lose_the_lock)
        with pytest.raises(JobFailed):
            await Night(holder, store, house.means(), NOW).run()
    state = await house.state(OLD)
    assert (state["archive_url"], state["archived_at"]) == (None, None)
    assert await partitions.count(house.conn, NAME) == 150


# ---- the drill, and what is brought back -----------------------------------------------------------------------------

Loads = Callable[..., Any]


async def test_a_drill_and_a_restore_compare_what_was_loaded_and_not_only_what_was_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that is read is the archive's, and yet becomes something else, or the manifest says something else."""
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    [found] = await catalog.every(house.conn)

    async def drilled(where: Any, what: str, instead: Loads, why: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(where, what, instead)
            with pytest.raises(ArchiveDamaged, match=why):
                await restore.drill(house.conn, house.store, found)

    fill, load = restore._fill, verify.load

    async def changes_a_value(conn: Connection, store: Any, archives: Any, into: Any, spool: Any) -> int:
        rows = await fill(conn, store, archives, into, spool)
        await conn.execute(f"UPDATE {into.qualified} SET temp_c = temp_c + 1 WHERE uptime_s = 7")
        return rows

    def says(**changes: Any) -> Loads:
        async def says_so(*args: Any) -> Manifest:
            return msgspec.structs.replace(await load(*args), **changes)

        return says_so

    assert await restore.drill(house.conn, house.store, found) == 150
    await drilled(restore, "_fill", changes_a_value, "is not what was archived")
    await drilled(verify, "load", says(min_ts=START - timedelta(days=1)), "is not what was archived")
    await drilled(verify, "load", says(max_ts=END + timedelta(days=1)), "is not what was archived")
    await drilled(verify, "load", says(rows=151), "150 rows were restored of 151")

    # Rows whose labels are nowhere would be left out of a join, and the day attached without them.
    await house.conn.execute("DELETE FROM heartbeat_labels WHERE network_type = 'wifi'")
    monkeypatch.setattr(restore, "_Q", {**restore._Q, "restore_labels": "SELECT '$table'"})
    with pytest.raises(ArchiveDamaged, match="150 rows were read"):
        await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    assert not await partitions.present(house.conn, NAME)
    assert (await house.state(OLD))["state"] == "dropped"
