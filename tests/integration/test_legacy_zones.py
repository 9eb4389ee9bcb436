"""NexMDM's times have no zone: they are those of the session that wrote them, and are read as such."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from bench.nexmdm import MONOLITHIC, PARTITIONED, Version, add_beat, add_device
from nexhb import devices, partitions, wire
from nexhb.db import Connection, Database
from nexhb.errors import BadInput
from nexhb.legacy import zones
from nexhb.legacy.zones import Change
from tests.integration.moves import Move, moving
from tests.integration.test_backfill import nexhb as command

MOVING = Path("docs/moving.md").read_text(encoding="utf-8")
NEW_YORK, KOLKATA = "America/New_York", "Asia/Kolkata"
A_YEAR: dict[str, Any] = {"days": 400, "retention_days": 400}
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
_numbers = itertools.count(1)


def change_of(zone: str, now: datetime, *, to_winter: bool) -> datetime:
    """The last change of daylight saving time that is over, by the hour."""
    hour = now.replace(minute=0, second=0, microsecond=0) - 3 * HOUR
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
    """An empty one, as create_all makes it, with kiosk-1."""
    async with moving(MONOLITHIC, empty_database, conn, now) as one:
        await add_device(one.source, "kiosk-1", devices.new_token())
        yield one


async def written_in(move: Move, zone: str) -> None:
    """NexMDM's sessions have this zone from now on, by the database's setting; the test's own too."""
    name = await move.source.fetchval("SELECT quote_ident(current_database())")
    await move.source.execute(f"ALTER DATABASE {name} SET timezone TO '{zone}'; SET timezone TO '{zone}'")


async def moments(move: Move) -> list[datetime]:
    """When the heartbeats were made that nexhb has."""
    return [row["ts"] for row in await move.history()]


@pytest.mark.parametrize("zone", ["UTC", NEW_YORK, KOLKATA])
@pytest.mark.parametrize("version", [MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
async def test_every_heartbeat_keeps_its_moment(
    empty_database: Database, conn: Connection, now: datetime, version: Version, zone: str
) -> None:
    """At America/New_York a heartbeat of 10:47 UTC became one of 05:47; at Asia/Kolkata the last 5.5 hours were left
    out. Both times the import said that both sides agree."""
    winter, summer = (change_of(NEW_YORK, now, to_winter=to_winter) for to_winter in (True, False))
    moved = sorted(
        change + away
        for change in (winter, summer)
        for away in (-DAY, -2 * HOUR, -50 * MINUTE, -10 * MINUTE, 10 * MINUTE, 50 * MINUTE, 2 * HOUR, DAY)
        if change + away < now
    )
    wanted = sorted({*moved, *(now - n * HOUR for n in range(30))})
    async with moving(version, empty_database, conn, now) as move:
        await add_device(move.source, "kiosk-1", devices.new_token())
        if version.partitioned:
            await more_days(move.source, {at.date() + n * DAY for at in wanted for n in (-1, 0, 1)})
        await written_in(move, zone)
        for at in wanted:
            await add_beat(move.source, "kiosk-1", at)
        found = await move.run(**A_YEAR, repeated_hour="by-id")
        assert await moments(move) == wanted
        assert (found.why_not, found.zone.name, found.newest) == ([], zone, now)
        assert (found.total("written"), found.total("missing")) == (len(wanted), 0)
        # What comes later is taken, nothing else is read again, and the choice is kept.
        await add_beat(move.source, "kiosk-1", now - 30 * MINUTE)
        again = await move.run(**A_YEAR)
        assert (again.total("written_now"), again.why_not) == (1, [])
        assert (await move.run(**A_YEAR)).total("read_now") == 0


async def more_days(source: Connection, days: set[date]) -> None:
    """Partitions that are not there yet."""
    for day in sorted(days):
        await source.execute(
            f"""CREATE TABLE IF NOT EXISTS device_heartbeats_{day:%Y%m%d} PARTITION OF device_heartbeats
            FOR VALUES FROM ('{day}') TO ('{day + DAY}')"""
        )


# ---- which zone it is --------------------------------------------------------------------------------------------


@pytest.fixture
async def role(old: Move) -> AsyncIterator[str]:
    """A role that owns NexMDM's tables."""
    name = f"nexmdm_{next(_numbers)}"
    await old.source.execute(
        f"""CREATE ROLE {name} LOGIN; ALTER TABLE devices OWNER TO {name};
        ALTER TABLE device_heartbeats OWNER TO {name}"""
    )
    yield name
    await old.source.execute(f"RESET ROLE; DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


async def here(old: Move) -> str:
    """The name of its database."""
    return str(await old.source.fetchval("SELECT current_database()"))


@pytest.mark.parametrize(
    ("how", "said"),
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
async def test_the_zone_is_the_one_of_the_role_that_writes(old: Move, role: str, how: str, said: str) -> None:
    await old.source.execute(how.format(role=role, database=await here(old)))
    await old.source.execute(f"SET timezone TO '{KOLKATA}'")
    at = await old.at(HOUR)
    found = await old.run()
    assert await moments(old) == [at]
    assert found.zone == (KOLKATA, f"the role '{role}', by {said}")


async def test_without_any_setting_it_is_the_servers(old: Move) -> None:
    plain = await Database(old.dsn).connect(application="test", timezone=None)
    server = await plain.fetchval("SHOW timezone")
    await plain.close()
    found = await old.run()
    assert found.zone.name == server
    assert found.zone.said_by.endswith("by the server's configuration")


async def test_roles_that_write_in_different_zones_are_named_and_the_operator_chooses(old: Move, role: str) -> None:
    other = f"{role}_app"
    await old.source.execute(
        f"""CREATE ROLE {other} LOGIN; GRANT INSERT ON device_heartbeats TO {other};
        ALTER ROLE {other} SET timezone TO '{KOLKATA}'; ALTER ROLE {role} SET timezone TO 'Etc/UTC'"""
    )
    with pytest.raises(BadInput, match=rf"different time zones: Etc/UTC \(.*'{role}'.*Asia/Kolkata \(.*'{other}'"):
        await old.run()
    assert (await old.run(timezone="Asia/Kolkata")).zone == (KOLKATA, "--source-timezone")
    await old.source.execute(f"ALTER ROLE {other} SET timezone TO 'Zulu'")  # another name of the same
    await old.to.execute("DELETE FROM legacy_sources")
    assert (await old.run()).zone.name == "Etc/UTC"
    await old.source.execute(f"DROP OWNED BY {other}; DROP ROLE {other}")


async def test_a_zone_of_the_importing_role_does_not_pass_for_the_servers(old: Move, role: str) -> None:
    await old.source.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {await here(old)} SET timezone TO '{KOLKATA}'")
    with pytest.raises(BadInput, match=r"server is not visible: this role sets its own \(Asia/Kolkata\)"):
        await old.run()
    await old.source.execute(f"ALTER ROLE {role} SET timezone TO 'UTC'")  # then it does not matter
    assert (await old.run()).zone.name == "UTC"


@pytest.mark.parametrize(
    ("zone", "name"),
    [("america/new_york", NEW_YORK), ("EST5EDT", "EST5EDT"), ("CET", "CET"), ("+05:30", None), ("<+03>-3", None)],
)
async def test_a_zone_is_what_the_servers_setting_takes_for_one(old: Move, zone: str, name: str | None) -> None:
    """CET is a zone with daylight saving time as a setting, and one without as an abbreviation (AT TIME ZONE)."""
    summer = change_of("Europe/Berlin", old.now, to_winter=False) + 10 * DAY
    await old.source.execute(f"SET timezone TO '{zone}'")
    for at in (summer, old.now - HOUR):
        await add_beat(old.source, "kiosk-1", at)
    found = await old.run(timezone=zone, **A_YEAR)
    assert await moments(old) == [summer, old.now - HOUR]
    assert name in (None, found.zone.name)


async def test_a_zone_that_is_none_is_said_so(old: Move) -> None:
    with pytest.raises(BadInput, match="does not know the time zone 'Mars/Olympus'"):
        await old.run(timezone="Mars/Olympus")


async def test_a_zone_that_changes_between_imports_is_refused(old: Move) -> None:
    await old.at(HOUR)
    await old.run(timezone="UTC")
    await written_in(old, NEW_YORK)
    with pytest.raises(BadInput, match=r"earlier imports read the times of .* as UTC; now they are America/New_York"):
        await old.run()
    assert (await old.run(timezone="Etc/GMT")).why_not == []  # the same by another name
    with pytest.raises(BadInput, match="as Etc/GMT"):
        await old.run(timezone=KOLKATA)


async def test_where_nothing_was_read_yet_the_zone_may_change(old: Move) -> None:
    await old.run(timezone=KOLKATA)
    at = await old.at(HOUR)
    await old.run(timezone="UTC")
    assert await moments(old) == [at]


@pytest.mark.parametrize("table", ["devices", "device_heartbeats"])
async def test_a_column_that_has_a_zone_is_read_by_it(old: Move, table: str) -> None:
    column = {"devices": "created_at", "device_heartbeats": "ts"}[table]
    await old.source.execute(f"ALTER TABLE {table} ALTER {column} TYPE timestamptz USING {column} AT TIME ZONE 'UTC'")
    await written_in(old, NEW_YORK)
    made = datetime(2026, 1, 5, 12, tzinfo=UTC)
    await old.source.execute("UPDATE devices SET created_at = $1::timestamptz", made)
    fold = change_of(NEW_YORK, old.now, to_winter=True)
    wanted = [fold - 10 * MINUTE, fold + 20 * MINUTE, old.now - HOUR]
    for at in wanted:
        await add_beat(old.source, "kiosk-1", at)
    repeated: dict[str, Any] = {} if table == "device_heartbeats" else {"repeated_hour": "by-id"}
    found = await old.run(**A_YEAR, **repeated)
    assert (await moments(old), found.why_not) == (wanted, [])
    assert await old.to.fetchval("SELECT created_at FROM devices") == made


# ---- hours that are there twice, or never ------------------------------------------------------------------------


async def in_the_repeated_hour(old: Move, *minutes: int) -> datetime:
    """Heartbeats so many minutes after the change to winter; when that was."""
    await written_in(old, NEW_YORK)
    change = change_of(NEW_YORK, old.now, to_winter=True)
    for n in minutes:
        await add_beat(old.source, "kiosk-1", change + n * MINUTE)
    return change


async def test_a_repeated_hour_is_refused_until_the_operator_chooses(old: Move) -> None:
    change = await in_the_repeated_hour(old, -61, -40, -10, 30, 61)
    with pytest.raises(BadInput, match=r"3 heartbeats are stamped .* 01:00 to 02:00, .*Give --repeated-hour by-id"):
        await old.run(**A_YEAR)
    assert await old.to.fetchval("SELECT count(*) FROM devices") == 0  # nothing was done
    assert (await old.run(days=0)).why_not == []  # it lies outside, and is not asked for
    await old.run(**A_YEAR, repeated_hour="by-id")
    assert await moments(old) == [change + n * MINUTE for n in (-61, -40, -10, 30, 61)]
    with pytest.raises(BadInput, match="were given --repeated-hour by-id"):
        await old.run(**A_YEAR, repeated_hour="first")


@pytest.mark.parametrize(("chosen", "minutes"), [("first", [-61, -40, -30, 61]), ("second", [-61, 20, 30, 61])])
async def test_all_of_a_repeated_hour_may_be_of_one_pass(old: Move, chosen: str, minutes: list[int]) -> None:
    change = await in_the_repeated_hour(old, -61, -40, 30, 61)
    found = await old.run(**A_YEAR, repeated_hour=chosen)
    assert (await moments(old), found.why_not) == ([change + n * MINUTE for n in minutes], [])


async def test_an_order_that_does_not_tell_is_said_so(old: Move) -> None:
    await in_the_repeated_hour(old, -61, -50, -40, 61)
    with pytest.raises(BadInput, match="the order of their hb_id does not tell"):
        await old.run(**A_YEAR, repeated_hour="by-id")


async def test_a_repeated_hour_without_heartbeats_asks_for_nothing(old: Move) -> None:
    await in_the_repeated_hour(old, -61, 61)
    assert (await old.run(**A_YEAR)).total("written") == 2


async def test_a_time_that_the_zone_never_had_shows_that_it_is_another_zone(old: Move) -> None:
    change = change_of(NEW_YORK, old.now, to_winter=False)
    await add_beat(old.source, "kiosk-1", (change - 5 * HOUR + 30 * MINUTE).replace(tzinfo=UTC))  # 02:30, in UTC
    with pytest.raises(BadInput, match=r"1 heartbeats are stamped .* 02:00 to 03:00, which this time zone left out"):
        await old.run(timezone=NEW_YORK, **A_YEAR)
    assert (await old.run(timezone="UTC", **A_YEAR)).total("written") == 1


def test_a_repeated_hour_has_to_be_over_and_lie_in_one_day() -> None:
    change = Change(datetime(2026, 11, 1, 6, tzinfo=UTC), -4 * HOUR, -5 * HOUR)
    assert (change.local, change.repeats) == ((datetime(2026, 11, 1, 1), datetime(2026, 11, 1, 2)), True)  # noqa: DTZ001
    assert not Change(change.at, -5 * HOUR, -4 * HOUR).repeats


@pytest.mark.parametrize(
    ("at", "now", "chosen", "said"),
    [
        (datetime(2026, 11, 1, 6, tzinfo=UTC), datetime(2026, 11, 1, 6, 30, tzinfo=UTC), "by-id", "is not over"),
        (datetime(2026, 11, 1, 6, tzinfo=UTC), datetime(2026, 11, 1, 5, 30, tzinfo=UTC), "first", "is not over"),
        (datetime(2026, 10, 25, 0, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC), "first", "--repeated-hour second"),
    ],
)
async def test_what_cannot_be_told_apart_is_refused(
    old: Move, at: datetime, now: datetime, chosen: zones.Repeated, said: str
) -> None:
    change = Change(at, HOUR, timedelta(0))
    await add_beat(old.source, "kiosk-1", change.local[0].replace(tzinfo=UTC))
    with pytest.raises(BadInput, match=said):
        await zones.folds(old.source, [change], now, chosen)


# ---- behind the clock -------------------------------------------------------------------------------------------


async def test_heartbeats_ahead_of_the_clock_are_no_agreement(old: Move, database: Database, tmp_path: Path) -> None:
    """At Asia/Kolkata, read as UTC, those of the last 5.5 hours lie ahead of the clock: left out, in silence."""
    await old.source.execute(f"SET timezone TO '{KOLKATA}'")
    await old.at(HOUR)
    found = await old.run(timezone="UTC")
    assert found.ahead is not None
    assert (found.ahead.rows, found.why_not) == (1, ["1 heartbeats lie ahead of the source's clock"])
    words = ("import-legacy", "--source", old.dsn, "--source-timezone")
    code, out, err = await command(database, tmp_path, *words, "UTC")
    assert (code, "BOTH SIDES DO NOT AGREE" in out) == (1, True)
    assert re.search(r"NOT TAKEN: 1 heartbeats that lie ahead of the source's clock, by 2(69|70)\.\d minutes", out), out
    code, out, err = await command(database, tmp_path, *words, KOLKATA)
    assert (code, "times of the source: Asia/Kolkata (--source-timezone)" in out) == (0, True), err
    # A second is enough: some of it would be left behind.
    await add_beat(old.source, "kiosk-1", datetime.now(UTC) + MINUTE)
    assert (await command(database, tmp_path, *words, KOLKATA))[0] == 1


async def test_a_wrong_zone_is_the_commands_failure(old: Move, database: Database, tmp_path: Path) -> None:
    await old.at(HOUR)
    await old.run(timezone="UTC")
    code, out, _ = await command(database, tmp_path, "import-legacy", "--source", old.dsn, "--source-timezone", KOLKATA)
    assert code == 1
    assert "earlier imports read the times of" in out
    assert (await command(database, tmp_path, "import-legacy", "--source", old.dsn, "--source-timezone", "x"))[0] == 2


async def test_a_history_in_a_wrong_zone_is_taken_back_and_imported_again(old: Move) -> None:
    """As docs/moving.md says it: imports from before migration 0011 read every database as UTC."""
    await written_in(old, NEW_YORK)
    wanted = [await old.at(n * HOUR) for n in (30, 20, 10)]
    await old.run(timezone="UTC")
    assert await moments(old) != wanted
    live = old.now - 26 * HOUR
    (table,) = (await partitions.ensure(old.to, [live.date()])).values()
    await old.to.execute(
        f"""INSERT INTO {table} (ts, received_at, device_no, bucket, label_no, clock_wrong)
        SELECT $1::timestamptz, $1::timestamptz + interval '1 second', device_no, $2, label_no, false
        FROM devices, heartbeat_labels""",
        live, wire.bucket_of(live, 10),
    )  # fmt: skip
    statements = MOVING.partition("## A wrong time zone")[2].partition("```sql")[2].partition("```")[0]
    name = await old.to.fetchval("SELECT source FROM legacy_sources")
    await old.to.execute(statements.replace(":'source'", f"'{name}'"))
    assert await moments(old) == [live]
    assert await old.to.fetchval("SELECT sum(written) FROM ingest_ledger") == 0  # the live one was written by hand
    assert (await old.run()).why_not == []
    assert await moments(old) == sorted([live, *wanted])
    assert await old.to.fetchval("SELECT sum(written) FROM ingest_ledger") == 3
