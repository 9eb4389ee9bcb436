"""NexMDM's times have no time zone: they are read in the zone of the sessions that wrote them."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from bench.nexmdm import MONOLITHIC, PARTITIONED, Version
from nexhb import partitions
from nexhb.devices import tokens
from nexhb.errors import BadInput
from nexhb.heartbeat import bucket_of
from nexhb.nexmdm import zones
from nexhb.nexmdm.zones import Change
from nexhb.postgres.connections import Connection, Database
from tests.support.commands import nexhb as command
from tests.support.moves import Move, moving
from tests.support.nexmdm_rows import add_beat, add_device

MOVING = Path("docs/moving.md").read_text(encoding="utf-8")
NEW_YORK, KOLKATA = "America/New_York", "Asia/Kolkata"
A_YEAR: dict[str, Any] = {"days": 400, "retention_days": 400}
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
_numbers = itertools.count(1)


def change_of(zone: str, now: datetime, *, to_winter: bool) -> datetime:
    """Return the last change of daylight saving time that is at least three days ago, so that an import of the last day
    does not include it."""
    hour = now.replace(minute=0, second=0, microsecond=0) - 3 * DAY
    offset = ZoneInfo(zone).utcoffset
    while True:
        before, after = (offset(at.replace(tzinfo=UTC).astimezone(ZoneInfo(zone))) for at in (hour - MINUTE, hour))
        assert before is not None
        assert after is not None
        if before != after and (after < before) is to_winter:
            return hour
        hour -= HOUR


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """Provide a move from a database with kiosk-1 and no heartbeats, as NexMDM's create_all makes it."""
    async with moving(MONOLITHIC, empty_database, conn, now) as one:
        await add_device(one.source, "kiosk-1", tokens.new_token())
        yield one


async def written_in(move: Move, zone: str) -> None:
    """Set the time zone of NexMDM's sessions, as a setting of the database, and of the test's own session."""
    name = await move.source.fetchval("SELECT quote_ident(current_database())")
    await move.source.execute(f"ALTER DATABASE {name} SET timezone TO '{zone}'; SET timezone TO '{zone}'")


async def moments(move: Move) -> list[datetime]:
    """Return the times of the heartbeats that nexhb has."""
    return [row["ts"] for row in await move.history()]


@pytest.mark.parametrize("zone", ["UTC", NEW_YORK, KOLKATA])
@pytest.mark.parametrize("version", [MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
async def test_every_heartbeat_keeps_its_moment(
    empty_database: Database, conn: Connection, now: datetime, version: Version, zone: str
) -> None:
    """Formerly, with America/New_York, a heartbeat of 10:47 UTC became a heartbeat of 05:47; with Asia/Kolkata, the
    last 5.5 hours were missing. In both cases the import reported that both sides agree."""
    winter, summer = (change_of(NEW_YORK, now, to_winter=to_winter) for to_winter in (True, False))
    moved = sorted(
        change + away
        for change in (winter, summer)
        for away in (-DAY, -2 * HOUR, -50 * MINUTE, -10 * MINUTE, 10 * MINUTE, 50 * MINUTE, 2 * HOUR, DAY)
    )
    expected = sorted({*moved, *(now - n * HOUR for n in range(30))})
    async with moving(version, empty_database, conn, now) as move:
        await add_device(move.source, "kiosk-1", tokens.new_token())
        if version.partitioned:
            await more_days(move.source, {at.date() + n * DAY for at in expected for n in (-1, 0, 1)})
        await written_in(move, zone)
        for at in expected:
            await add_beat(move.source, "kiosk-1", at)
        found = await move.run(**A_YEAR, repeated_hour="by-id")
        assert await moments(move) == expected
        assert (found.disagreements, found.zone.name, found.newest) == ([], zone, now)
        assert (found.total("written"), found.total("missing")) == (len(expected), 0)
        # A later heartbeat is imported, nothing else is read again, and the choice for the repeated hour stays in
        # force.
        await add_beat(move.source, "kiosk-1", now - 30 * MINUTE)
        again = await move.run(**A_YEAR)
        assert (again.total("written_now"), again.disagreements) == (1, [])
        assert (await move.run(**A_YEAR)).total("read_now") == 0


async def more_days(source: Connection, days: set[date]) -> None:
    """Create missing partitions."""
    for day in sorted(days):
        await source.execute(
            f"""CREATE TABLE IF NOT EXISTS device_heartbeats_{day:%Y%m%d} PARTITION OF device_heartbeats
            FOR VALUES FROM ('{day}') TO ('{day + DAY}')"""
        )


# ---- the time zone -----------------------------------------------------------------------------------------------


@pytest.fixture
async def role(old: Move) -> AsyncIterator[str]:
    """Create a role that owns NexMDM's tables."""
    name = f"nexmdm_{next(_numbers)}"
    await old.source.execute(
        f"""CREATE ROLE {name} LOGIN; ALTER TABLE devices OWNER TO {name};
        ALTER TABLE device_heartbeats OWNER TO {name}"""
    )
    yield name
    await old.source.execute(f"RESET ROLE; DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


async def here(old: Move) -> str:
    """Return the name of NexMDM's database."""
    return str(await old.source.fetchval("SELECT current_database()"))


@pytest.mark.parametrize(
    ("how", "set_by"),
    [
        ("ALTER ROLE {role} SET timezone TO 'Asia/Kolkata'", "ALTER ROLE"),
        ("ALTER DATABASE {database} SET timezone TO 'Asia/Kolkata'", "ALTER DATABASE"),
        ("ALTER ROLE {role} IN DATABASE {database} SET timezone TO 'asia/kolkata'", "ALTER ROLE … IN DATABASE"),
        ("ALTER ROLE {role} IN DATABASE {database} SET timezone TO 'Asia/Kolkata';"
         "ALTER ROLE {role} SET timezone TO 'Asia/Tokyo'; ALTER DATABASE {database} SET timezone TO 'Asia/Seoul'",
         "ALTER ROLE … IN DATABASE"),
        ("ALTER ROLE {role} SET timezone TO 'Asia/Kolkata'; ALTER DATABASE {database} SET timezone TO 'Asia/Seoul'",
         "ALTER ROLE"),
    ],
)  # fmt: skip
async def test_the_zone_is_that_of_the_role_that_writes(old: Move, role: str, how: str, set_by: str) -> None:
    await old.source.execute(how.format(role=role, database=await here(old)))
    await old.source.execute(f"SET timezone TO '{KOLKATA}'")
    at = await old.at(HOUR)
    found = await old.run()
    assert await moments(old) == [at]
    assert found.zone == (KOLKATA, f"the role '{role}', by {set_by}")


async def test_without_any_setting_the_servers_zone_counts(old: Move) -> None:
    plain = await Database(old.dsn).connect(application="test", timezone=None)
    server = await plain.fetchval("SHOW timezone")
    await plain.close()
    found = await old.run()
    assert found.zone.name == server
    assert found.zone.set_by.endswith("by the server's configuration")


async def test_if_roles_write_in_different_zones_the_operator_has_to_choose(old: Move, role: str) -> None:
    other = f"{role}_app"
    await old.source.execute(
        f"""CREATE ROLE {other} LOGIN; GRANT INSERT ON device_heartbeats TO {other};
        ALTER ROLE {other} SET timezone TO '{KOLKATA}'; ALTER ROLE {role} SET timezone TO 'Etc/UTC'"""
    )
    with pytest.raises(BadInput, match=rf"different time zones: Etc/UTC \(.*'{role}'.*Asia/Kolkata \(.*'{other}'"):
        await old.run()
    assert (await old.run(timezone="Asia/Kolkata")).zone == (KOLKATA, "--source-timezone")
    await old.source.execute(f"ALTER ROLE {other} SET timezone TO 'Zulu'")  # another name of the same zone
    await old.to.execute("DELETE FROM legacy_sources")
    assert (await old.run()).zone.name == "Etc/UTC"
    await old.source.execute(f"DROP OWNED BY {other}; DROP ROLE {other}")


async def test_the_importing_roles_own_zone_is_not_mistaken_for_the_servers(old: Move, role: str) -> None:
    await old.source.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {await here(old)} SET timezone TO '{KOLKATA}'")
    with pytest.raises(BadInput, match=r"server is not visible: this role sets its own \(Asia/Kolkata\)"):
        await old.run()
    await old.source.execute(f"ALTER ROLE {role} SET timezone TO 'UTC'")  # then the server's setting does not matter
    assert (await old.run()).zone.name == "UTC"


@pytest.mark.parametrize(
    ("zone", "name"),
    [("america/new_york", NEW_YORK), ("EST5EDT", "EST5EDT"), ("CET", "CET"), ("+05:30", None), ("<+03>-3", None)],
)
async def test_zone_names_mean_what_the_servers_setting_means_by_them(old: Move, zone: str, name: str | None) -> None:
    """As a setting, CET has daylight saving time; as an abbreviation (AT TIME ZONE) it has none."""
    summer = change_of("Europe/Berlin", old.now, to_winter=False) + 10 * DAY
    await old.source.execute(f"SET timezone TO '{zone}'")
    for at in (summer, old.now - HOUR):
        await add_beat(old.source, "kiosk-1", at)
    found = await old.run(timezone=zone, **A_YEAR)
    assert await moments(old) == [summer, old.now - HOUR]
    assert name in (None, found.zone.name)


async def test_an_unknown_zone_is_rejected(old: Move) -> None:
    with pytest.raises(BadInput, match="does not know the time zone 'Mars/Olympus'"):
        await old.run(timezone="Mars/Olympus")


async def test_a_zone_that_changes_between_imports_is_rejected(old: Move) -> None:
    await old.at(HOUR)
    await old.run(timezone="UTC")
    await written_in(old, NEW_YORK)
    with pytest.raises(BadInput, match=r"earlier imports read the times of .* as UTC; now they are America/New_York"):
        await old.run()
    assert (await old.run(timezone="Etc/GMT")).disagreements == []  # another name of the same zone
    with pytest.raises(BadInput, match="as Etc/GMT"):
        await old.run(timezone=KOLKATA)


async def test_the_zone_may_change_before_the_first_heartbeat_is_imported(old: Move) -> None:
    await old.run(timezone=KOLKATA)
    at = await old.at(HOUR)
    await old.run(timezone="UTC")
    assert await moments(old) == [at]


@pytest.mark.parametrize("table", ["devices", "device_heartbeats"])
async def test_a_column_with_a_time_zone_is_read_as_it_is(old: Move, table: str) -> None:
    column = {"devices": "created_at", "device_heartbeats": "ts"}[table]
    await old.source.execute(f"ALTER TABLE {table} ALTER {column} TYPE timestamptz USING {column} AT TIME ZONE 'UTC'")
    await written_in(old, NEW_YORK)
    made = datetime(2026, 1, 5, 12, tzinfo=UTC)
    await old.source.execute("UPDATE devices SET created_at = $1::timestamptz", made)
    fold = change_of(NEW_YORK, old.now, to_winter=True)
    expected = [fold - 10 * MINUTE, fold + 20 * MINUTE, old.now - HOUR]
    for at in expected:
        await add_beat(old.source, "kiosk-1", at)
    repeated: dict[str, Any] = {} if table == "device_heartbeats" else {"repeated_hour": "by-id"}
    found = await old.run(**A_YEAR, **repeated)
    assert (await moments(old), found.disagreements) == (expected, [])
    assert await old.to.fetchval("SELECT created_at FROM devices") == made


# ---- hours that occur twice, or never ----------------------------------------------------------------------------


async def in_the_repeated_hour(old: Move, *minutes: int) -> datetime:
    """Add heartbeats at these minutes after the change to winter time; return the time of the change."""
    await written_in(old, NEW_YORK)
    change = change_of(NEW_YORK, old.now, to_winter=True)
    for n in minutes:
        await add_beat(old.source, "kiosk-1", change + n * MINUTE)
    return change


async def test_a_repeated_hour_is_rejected_until_the_operator_chooses(old: Move) -> None:
    change = await in_the_repeated_hour(old, -61, -40, -10, 30, 61)
    with pytest.raises(BadInput, match=r"3 heartbeats are stamped .* 01:00 to 02:00, .*Give --repeated-hour by-id"):
        await old.run(**A_YEAR)
    assert await old.to.fetchval("SELECT count(*) FROM devices") == 0  # nothing was imported
    # These days do not include the repeated hour, so that no choice is needed.
    assert (await old.run(days=0)).disagreements == []
    await old.run(**A_YEAR, repeated_hour="by-id")
    assert await moments(old) == [change + n * MINUTE for n in (-61, -40, -10, 30, 61)]
    with pytest.raises(BadInput, match="were given --repeated-hour by-id"):
        await old.run(**A_YEAR, repeated_hour="first")


@pytest.mark.parametrize(("chosen", "minutes"), [("first", [-61, -40, -30, 61]), ("second", [-61, 20, 30, 61])])
async def test_all_rows_of_a_repeated_hour_may_belong_to_one_pass(old: Move, chosen: str, minutes: list[int]) -> None:
    change = await in_the_repeated_hour(old, -61, -40, 30, 61)
    found = await old.run(**A_YEAR, repeated_hour=chosen)
    assert (await moments(old), found.disagreements) == ([change + n * MINUTE for n in minutes], [])


async def test_an_order_of_ids_that_does_not_divide_the_passes_is_rejected(old: Move) -> None:
    await in_the_repeated_hour(old, -61, -50, -40, 61)
    with pytest.raises(BadInput, match="the order of their hb_id does not show"):
        await old.run(**A_YEAR, repeated_hour="by-id")


async def test_a_repeated_hour_without_heartbeats_needs_no_choice(old: Move) -> None:
    await in_the_repeated_hour(old, -61, 61)
    assert (await old.run(**A_YEAR)).total("written") == 2


async def test_a_local_time_that_never_occurred_shows_that_the_zone_is_wrong(old: Move) -> None:
    change = change_of(NEW_YORK, old.now, to_winter=False)
    await add_beat(old.source, "kiosk-1", (change - 5 * HOUR + 30 * MINUTE).replace(tzinfo=UTC))  # 02:30, in UTC
    with pytest.raises(BadInput, match=r"1 heartbeats are stamped .* 02:00 to 03:00, which this time zone skipped"):
        await old.run(timezone=NEW_YORK, **A_YEAR)
    assert (await old.run(timezone="UTC", **A_YEAR)).total("written") == 1


def test_a_change_repeats_an_hour_only_if_the_offset_decreases() -> None:
    change = Change(datetime(2026, 11, 1, 6, tzinfo=UTC), -4 * HOUR, -5 * HOUR)
    assert (change.local, change.repeats) == ((datetime(2026, 11, 1, 1), datetime(2026, 11, 1, 2)), True)  # noqa: DTZ001
    assert not Change(change.at, -5 * HOUR, -4 * HOUR).repeats


@pytest.mark.parametrize(
    ("at", "now", "chosen", "message"),
    [
        (datetime(2026, 11, 1, 6, tzinfo=UTC), datetime(2026, 11, 1, 6, 30, tzinfo=UTC), "by-id", "is not over"),
        (datetime(2026, 11, 1, 6, tzinfo=UTC), datetime(2026, 11, 1, 5, 30, tzinfo=UTC), "first", "is not over"),
        (datetime(2026, 10, 25, 0, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC), "first", "--repeated-hour second"),
    ],
)
async def test_a_repeated_hour_must_be_over_and_within_one_day(
    old: Move, at: datetime, now: datetime, chosen: zones.RepeatedHour, message: str
) -> None:
    change = Change(at, HOUR, timedelta(0))
    await add_beat(old.source, "kiosk-1", change.local[0].replace(tzinfo=UTC))
    with pytest.raises(BadInput, match=message):
        await zones.folds(old.source, [change], now, chosen)


# ---- times in the future ----------------------------------------------------------------------------------------


async def test_heartbeats_ahead_of_the_clock_are_a_disagreement(old: Move, database: Database, tmp_path: Path) -> None:
    """If times of Asia/Kolkata are read as UTC, the last 5.5 hours are ahead of the clock. Formerly, their heartbeats
    were silently left out."""
    old.now = datetime.now(UTC)  # by which the source's clock judges
    await old.source.execute(f"SET timezone TO '{KOLKATA}'")
    await old.at(HOUR)
    found = await old.run(timezone="UTC")
    assert found.future is not None
    assert (found.future.rows, found.disagreements) == (1, ["1 heartbeats are ahead of the source's clock"])
    words = ("import-legacy", "--source", old.dsn, "--source-timezone")
    code, out, err = await command(database, tmp_path, *words, "UTC")
    assert (code, "BOTH SIDES DO NOT AGREE" in out) == (1, True)
    assert re.search(
        r"NOT IMPORTED: 1 heartbeats are ahead of the source's clock, by up to 2(69|70)\.\d minutes", out
    ), out
    code, out, err = await command(database, tmp_path, *words, KOLKATA)
    assert (code, "times of the source: Asia/Kolkata (--source-timezone)" in out) == (0, True), err
    # A single heartbeat ahead of the clock is enough for exit code 1, because it would be left out.
    await add_beat(old.source, "kiosk-1", datetime.now(UTC) + MINUTE)
    assert (await command(database, tmp_path, *words, KOLKATA))[0] == 1


async def test_with_a_wrong_zone_the_command_fails(old: Move, database: Database, tmp_path: Path) -> None:
    await old.at(HOUR)
    await old.run(timezone="UTC")
    code, out, _ = await command(database, tmp_path, "import-legacy", "--source", old.dsn, "--source-timezone", KOLKATA)
    assert code == 1
    assert "earlier imports read the times of" in out
    assert (await command(database, tmp_path, "import-legacy", "--source", old.dsn, "--source-timezone", "x"))[0] == 2


async def test_a_history_imported_in_a_wrong_zone_can_be_removed_and_imported_again(old: Move) -> None:
    """The steps are those of docs/moving.md: before migration 0011, imports read the times of every database as UTC."""
    await written_in(old, NEW_YORK)
    expected = [await old.at(n * HOUR) for n in (30, 20, 10)]
    await old.run(timezone="UTC")
    assert await moments(old) != expected
    live = old.now - 26 * HOUR
    (table,) = (await partitions.ensure(old.to, [live.date()])).values()
    await old.to.execute(
        f"""INSERT INTO {table} (ts, received_at, device_no, bucket, label_no, clock_wrong)
        SELECT $1::timestamptz, $1::timestamptz + interval '1 second', device_no, $2, label_no, false
        FROM devices, heartbeat_labels""",
        live, bucket_of(live, 10),
    )  # fmt: skip
    statements = MOVING.partition("## A wrong time zone")[2].partition("```sql")[2].partition("```")[0]
    name = await old.to.fetchval("SELECT source FROM legacy_sources")
    await old.to.execute(statements.replace(":'source'", f"'{name}'"))
    assert await moments(old) == [live]
    assert await old.to.fetchval("SELECT sum(written) FROM ingest_ledger") == 0  # the live row was written by hand
    assert (await old.run()).disagreements == []
    assert await moments(old) == sorted([live, *expected])
    assert await old.to.fetchval("SELECT sum(written) FROM ingest_ledger") == 3
