"""An import from NexMDM reads the right rows, rejects and reports the others, and changes nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bench import nexmdm
from bench.nexmdm import MONOLITHIC, PARTITIONED
from nexhb import audit, partitions, retirement
from nexhb.devices import registry
from nexhb.devices import tokens as device_tokens
from nexhb.errors import BadInput
from nexhb.heartbeat import bucket_of
from nexhb.jobs import known_days, plan
from nexhb.nexmdm import rows
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.history import Pace
from nexhb.postgres import locks
from nexhb.postgres.codecs import pack_ip
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from tests.support.commands import nexhb as command
from tests.support.moves import DAY, Move, moving
from tests.support.nexmdm_rows import add_beat, add_device


@pytest.fixture(params=[MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
async def move(
    request: pytest.FixtureRequest, empty_database: Database, conn: Connection, now: datetime
) -> AsyncIterator[Move]:
    """Provide a move from each version of NexMDM."""
    async with moving(request.param, empty_database, conn, now - timedelta(minutes=1)) as one:
        yield one


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """Provide a move from the version of NexMDM that has token_revoked_at."""
    async with moving(MONOLITHIC, empty_database, conn, now - timedelta(minutes=1)) as one:
        yield one


# ---- devices ----------------------------------------------------------------------------------------------------


async def test_a_device_is_imported_with_its_facts_and_its_token(old: Move) -> None:
    token = device_tokens.new_token()
    await add_device(old.source, "kiosk-1", token, manufacturer="samsung", android_version="13", build_id="TP1A")
    found = await old.run()
    row = await old.to.fetchrow("SELECT * FROM devices")
    assert row is not None
    assert (row["device_id"], row["alias"], row["model"], row["sdk_int"]) == ("kiosk-1", "Store kiosk-1", "SM-T500", 33)
    assert (row["manufacturer"], row["android_version"], row["build_id"]) == ("samsung", "13", "TP1A")
    assert row["created_at"] == nexmdm.CREATED.replace(tzinfo=UTC)
    assert await old.to.fetchval("SELECT token_sha256 FROM device_tokens") == device_tokens.hash_token(token)
    assert (found.devices.made, found.devices.tokens_added, found.devices.hashes_waiting) == (1, 1, 0)


async def test_a_known_device_keeps_its_token_and_gets_its_old_one_as_well(old: Move) -> None:
    own, former = await registry.add(old.to, "kiosk-1", "Our name"), device_tokens.new_token()
    await add_device(old.source, "kiosk-1", former)
    found = await old.run()
    assert (found.devices.made, found.devices.tokens_added) == (0, 1)
    assert await old.to.fetchval("SELECT alias FROM devices") == "Our name"
    tokens = {row[0] for row in await old.to.fetch("SELECT token_sha256 FROM device_tokens")}
    assert tokens == {device_tokens.hash_token(own), device_tokens.hash_token(former)}


async def test_a_device_that_cannot_be_imported_is_named_with_its_reason_and_does_not_stop_the_import(
    old: Move,
) -> None:
    token = device_tokens.new_token()
    await registry.add(old.to, "other", None)
    await old.to.execute("UPDATE device_tokens SET token_sha256 = $1", device_tokens.hash_token(token))
    await add_device(old.source, "a\nb", device_tokens.new_token())
    await add_device(old.source, "offline", device_tokens.new_token())
    await add_device(old.source, "taken", token)
    await add_device(old.source, "bare", token_id=None, token_hash="none")
    await add_device(old.source, "dear", token_id="short", token_hash="$2b$20$" + 53 * "a")
    await add_device(old.source, "good", device_tokens.new_token(), alias=300 * "x")
    for device_id in ("a\nb", "offline", "taken", "good"):
        await old.at(DAY, device_id)
    found = await old.run()
    assert {device_id: reason[:22] for device_id, reason in found.devices.rejected} == {
        "a\nb": "the id is not 1 to 100", "offline": "the id is reserved: it", "taken": "the token belongs to a",
        "bare": "there is neither a tok", "dear": "there is neither a tok",
    }  # fmt: skip
    assert (found.devices.seen, found.devices.made, found.devices.tokens_added) == (6, 4, 1)
    assert found.devices.dropped == {"alias": 1}
    assert {row["device_id"] for row in await old.history()} == {"taken", "good"}
    (day,) = found.days
    assert (day.source, day.rejected, day.written, day.missing, day.agrees) == (4, 2, 2, 0, True)


async def test_a_token_revoked_in_nexmdm_is_revoked_in_nexhb(old: Move) -> None:
    revoked_at = nexmdm.naive(old.now - DAY)
    await add_device(old.source, "gone", device_tokens.new_token(), token_revoked_at=revoked_at)
    await add_device(old.source, "here", device_tokens.new_token())
    await old.run()
    revoked = "SELECT device_id FROM device_tokens t JOIN devices USING (device_no) WHERE t.revoked_at IS NOT NULL"
    assert await old.to.fetchval("SELECT array_agg(device_id) FROM devices WHERE revoked_at IS NOT NULL") == ["gone"]
    assert [row[0] for row in await old.to.fetch(revoked)] == ["gone"]
    await old.source.execute("UPDATE devices SET token_revoked_at = $1", revoked_at)
    assert (await old.run()).devices.tokens_revoked == 1
    assert {row[0] for row in await old.to.fetch(revoked)} == {"gone", "here"}


async def test_a_device_that_was_rotated_does_not_get_its_old_token_back(old: Move) -> None:
    token = device_tokens.new_token()
    await add_device(old.source, "kiosk-1", token)
    await add_device(old.source, "kiosk-2", token_id=None, token_hash=nexmdm.token_hash("t" * 43))
    await old.run()
    new = {device_tokens.hash_token(await registry.rotate(old.to, device_id)) for device_id in ("kiosk-1", "kiosk-2")}
    found = await old.run()
    assert (found.devices.tokens_added, found.devices.hashes_waiting) == (0, 0)
    assert {row[0] for row in await old.to.fetch("SELECT token_sha256 FROM device_tokens")} == new
    assert await old.to.fetchval("SELECT count(*) FROM legacy_tokens WHERE bcrypt IS NOT NULL") == 0


# ---- heartbeats -------------------------------------------------------------------------------------------------


async def test_a_heartbeat_is_imported_with_every_column_and_a_value_that_does_not_fit_is_counted(move: Move) -> None:
    await add_device(move.source, "kiosk-1", device_tokens.new_token())
    ts = await move.at(
        DAY, ip="10.1.2.3", battery_pct=87, plugged=True, temp_c=31, network_type="wifi", signal_dbm=-60, uptime_s=5,
        ram_used_mb=1837, unity_pkg_version="2.1.0", unity_running=False, agent_version="1.0.9",
    )  # fmt: skip
    await move.at(
        DAY - timedelta(minutes=1), ip="nowhere", battery_pct=101, signal_dbm=-40_000, uptime_s=-1,
        network_type=33 * "x", agent_version=51 * "y", ram_used_mb=-5, unity_pkg_version=101 * "z",
    )  # fmt: skip
    found = await move.run()
    good, bad = await move.history()
    values = (
        ts, ts, False, 87, True, 31.0, "wifi", pack_ip("10.1.2.3"), -60, 5, 1837, "2.1.0", False, "1.0.9",
    )  # fmt: skip
    names = """ts received_at clock_wrong battery_pct plugged temp_c network_type ip signal_dbm uptime_s ram_used_mb
        unity_pkg_version unity_running agent_version"""
    assert tuple(good[name] for name in names.split()) == values
    nulls = "ip battery_pct signal_dbm uptime_s network_type agent_version ram_used_mb unity_pkg_version"
    assert [bad[name] for name in nulls.split()] == 8 * [None]
    assert found.dropped == dict.fromkeys(nulls.split(), 1)
    assert not found.differing_days


async def test_ssid_is_imported_if_the_version_has_it(
    empty_database: Database, conn: Connection, now: datetime
) -> None:
    async with moving(PARTITIONED, empty_database, conn, now - timedelta(minutes=1)) as move:
        await add_device(move.source, "kiosk-1", device_tokens.new_token())
        await move.at(DAY, ssid="Store-42")
        await move.run()
        assert [row["ssid"] for row in await move.history()] == ["Store-42"]


async def test_the_first_row_of_a_bucket_is_imported_unless_the_bucket_has_a_row(old: Move) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    await old.run()
    base = (old.now - DAY).replace(second=0, microsecond=0)
    for second in (3, 1, 2):
        await add_beat(old.source, "kiosk-1", base + timedelta(seconds=second), battery_pct=second)
    await add_beat(old.source, "kiosk-1", base + timedelta(seconds=21), battery_pct=21)
    (table,) = (await partitions.ensure(old.to, [base.date()])).values()
    here = base + timedelta(seconds=25)  # a live heartbeat of the same bucket
    await old.to.execute(
        f"""INSERT INTO {table} (ts, received_at, device_no, bucket, label_no, battery_pct, clock_wrong)
        SELECT $1, $1, device_no, $2, 1, 99, false FROM devices""",
        here, bucket_of(here, 10),
    )  # fmt: skip
    await old.to.execute("INSERT INTO heartbeat_labels VALUES (DEFAULT, '', '', '', '')")
    await old.to.execute("INSERT INTO ingest_ledger VALUES ($1, 77, 1, 0)", base.date())
    (day,) = (await old.run()).days
    assert [row["battery_pct"] for row in await old.history()] == [1, 99]
    assert (day.source, day.source_keys, day.written, day.deduplicated, day.missing) == (4, 2, 1, 3, 0)
    ledger = await old.to.fetchrow("SELECT written, deduplicated FROM ingest_ledger WHERE slot = 0")
    assert tuple(ledger or ()) == (1, 3)
    assert (await audit.audit(old.to, base.date())).missing == 0


async def test_a_second_run_imports_every_new_row(move: Move) -> None:
    for n in range(1, 4):
        await add_device(move.source, f"kiosk-{n}", device_tokens.new_token())
    for hours in (30, 20, 1):
        await move.at(timedelta(hours=hours), "kiosk-2")
    assert (await move.run()).total("written_now") == 3
    # Add later and earlier rows, one of a device that was already read, and one of a device that enrolled since.
    await move.at(timedelta(minutes=10), "kiosk-1")
    await move.at(timedelta(hours=31), "kiosk-1")
    await move.at(timedelta(hours=19), "kiosk-3")
    await add_device(move.source, "kiosk-0", device_tokens.new_token())
    await move.at(timedelta(hours=2), "kiosk-0")
    found = await move.run()
    assert (found.total("written_now"), found.differing_days) == (4, [])
    assert (await move.run()).total("read_now") == 0
    assert len(await move.history()) == 7


async def test_a_device_that_enrols_during_the_import_is_imported_too(
    old: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    await old.at(DAY)
    count = sources.NexmdmDatabase.count

    async def enrol_meanwhile(self: sources.NexmdmDatabase, start: datetime, end: datetime) -> int:
        if not await old.source.fetchval("SELECT count(*) FROM devices WHERE id = 'new'"):
            await add_device(old.source, "new", device_tokens.new_token())
            await old.at(DAY + timedelta(seconds=1), "new")
        return await count(self, start, end)

    monkeypatch.setattr(sources.NexmdmDatabase, "count", enrol_meanwhile)
    found = await old.run()
    assert (found.devices.made, found.total("written_now"), found.differing_days) == (2, 2, [])


async def test_rows_without_a_device_are_rejected_and_counted(old: Move) -> None:
    await old.source.execute("ALTER TABLE device_heartbeats DROP CONSTRAINT device_heartbeats_device_id_fkey")
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    await old.at(DAY)
    await old.at(DAY, "nobody")
    found = await old.run()
    assert (found.unknown_ids, found.total("rejected"), found.differing_days) == ({"nobody"}, 1, [])


async def test_a_day_that_nexhb_has_dropped_is_rejected_and_rows_beyond_the_retention_are_not_imported(
    old: Move,
) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    dropped, kept, ancient = [await old.at(days * DAY) for days in (5, 2, 95)]
    await old.to.execute(
        """INSERT INTO hb_partitions (partition_name, range_start, range_end, state)
        VALUES ('device_heartbeats_old', $1, $2, 'dropped')""",
        partitions.midnight(dropped.date()), partitions.midnight(dropped.date()) + DAY,
    )  # fmt: skip
    found = await old.run(days=100)
    assert [(day.day, day.rejected_because) for day in found.days] == [
        (dropped.date(), "nexhb's partition for this day is dropped"), (kept.date(), ""),
    ]  # fmt: skip
    assert (found.differing_days, found.since) == ([], found.until.date() - timedelta(days=90))
    assert "retention_days is 90" in found.older_left
    assert ancient.date() < found.since
    assert [row["ts"] for row in await old.history()] == [kept]
    assert "--days is 7" in (await old.run()).older_left


async def test_an_import_into_a_frozen_day_makes_the_next_nightly_run_freeze_it_again(old: Move) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    ts = await old.at(20 * DAY)
    await old.run(days=30)
    (table,) = (await partitions.ensure(old.to, [ts.date()])).values()
    await old.to.execute("UPDATE hb_partitions SET row_count = 1, counted_at = now(), frozen_at = now()")
    await old.run(days=30)
    kinds = await steps(old, table)
    assert kinds == set()  # without new rows the day stays frozen
    await old.at(20 * DAY + timedelta(minutes=1))
    await old.run(days=30)
    assert await steps(old, table) == {plan.StepKind.COUNT, plan.StepKind.FREEZE}


async def steps(move: Move, table: str) -> set[plan.StepKind]:
    """Return the kinds of steps that the next nightly run would perform for a day."""
    rules = plan.NightlyRules(90, 1, timedelta(days=7))
    return {
        step.kind for step in plan.nightly(await known_days.read_days(move.to), move.now, rules) if step.target == table
    }


async def test_a_day_archived_during_its_import_makes_the_run_fail(
    old: Move, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    ts = await old.at(3 * DAY)
    read = sources.NexmdmDatabase.read

    async def detach_meanwhile(self: sources.NexmdmDatabase, *arguments: Any) -> list[Any]:
        found = await read(self, *arguments)
        async with database.connected(application="test", lock_timeout="2000") as other:
            await retirement.detach(other, partitions.table_name(ts.date()))
        return found

    monkeypatch.setattr(sources.NexmdmDatabase, "read", detach_meanwhile)
    found = await old.run()
    assert [(day.rejected_because, day.written) for day in found.days] == [
        ("nexhb archived this day during the import", 0)
    ]
    assert found.differing_days


# ---- the source, and the command ----------------------------------------------------------------------------------


async def test_a_source_that_is_not_a_nexmdm_database_is_rejected_and_a_real_one_is_only_read(
    old: Move, database: Database
) -> None:
    with pytest.raises(BadInput, match="devices has no id, token_hash"):
        async with sources.opened(database.dsn):
            pass
    async with sources.opened(old.dsn) as source:
        with pytest.raises(Exception, match="read-only"):
            await source.conn.execute("DELETE FROM devices")


async def test_the_command_prints_both_sides_and_its_exit_codes(old: Move, database: Database, tmp_path: Path) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    await add_device(old.source, "a\x1bb", device_tokens.new_token())
    await old.at(DAY)
    code, out, err = await command(database, tmp_path, "import-legacy", "--source", old.dsn)
    assert code == 0
    assert "both sides agree" in out
    assert "not imported 1: the id is not 1 to 100 printable characters" in out
    assert "\x1b" not in out
    assert "heartbeats: 1 of 1" in err
    async with locks.held(old.to, Lock.IMPORT, wait=False):
        assert (await command(database, tmp_path, "import-legacy", "--source", old.dsn))[0] == 3
    assert (await command(database, tmp_path, "import-legacy", "--source", database.dsn))[0] == 2
    assert (await command(database, tmp_path, "import-legacy", "--source", "postgresql://127.0.0.1:1/x"))[0] == 1


async def test_a_difference_between_the_sides_causes_exit_code_1(old: Move, database: Database, tmp_path: Path) -> None:
    await add_device(old.source, "kiosk-1", device_tokens.new_token())
    ts = await old.at(DAY)
    await old.run()
    # Rows are lost in nexhb, and the import cannot write them again.
    await old.to.execute(
        f"""DELETE FROM device_heartbeats;
        CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER lose BEFORE INSERT ON {partitions.table_name(ts.date())} FOR EACH ROW EXECUTE FUNCTION lose()"""
    )
    code, out, _ = await command(database, tmp_path, "import-legacy", "--source", old.dsn)
    assert code == 1
    assert "DOES NOT AGREE" in out


# ---- pure -------------------------------------------------------------------------------------------------------


def test_the_pace_keeps_to_the_rate_and_saves_up_no_more_than_the_time_of_the_rows() -> None:
    now = 0.0
    pace = Pace(1_000, clock=lambda: now)
    assert pace.wait_s(500) == 0.5
    now = 0.75  # the rows took a quarter of a second
    assert pace.wait_s(500) == 0.25
    now = 10.0
    assert [pace.wait_s(500), pace.wait_s(500)] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("token_id", "token_hash", "usable"),
    [
        (64 * "a", "unused", True), (64 * "A", None, True), (None, "$2b$12$" + 53 * "x", True),
        (None, "$2y$14$" + 53 * ".", True), (None, "$2b$15$" + 53 * "x", False), (62 * "a", "$2b$12$short", False),
        (None, None, False), ("", "", False),
    ],
)  # fmt: skip
def test_a_usable_token_has_a_sha256_or_a_bcrypt_hash_of_limited_cost(
    token_id: str, token_hash: str, usable: bool
) -> None:
    assert isinstance(rows.token({"token_id": token_id, "token_hash": token_hash}), rows.Token) is usable
