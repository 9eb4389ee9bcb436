"""The nightly run makes the uptimes of ended days from their heartbeats, before a day may be archived."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from random import Random

import pytest

from nexhb import partitions
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching import device_days, months, places
from nexhb.watching.device_days import DayTable, Device, UptimeRules
from nexhb.watching.places import Place
from nexhb.watching.uptime import Circumstances, Range
from tests.support.nightly import NOW, OLD, House
from tests.support.stored_heartbeats import moment, store
from tests.support.uptime_truth import DAY, HOUR, Sent, history, true_parts, usual

YESTERDAY = NOW.date() - timedelta(days=1)
START = partitions.midnight(YESTERDAY).timestamp()
CREATED = NOW - timedelta(days=3)
UP = 900_000


async def add_device(conn: Connection, device_id: str, site: str | None = None) -> int:
    number: int = await conn.fetchval(
        "INSERT INTO devices (device_id, created_at, site) VALUES ($1, $2, $3) RETURNING device_no",
        device_id,
        CREATED,
        site,
    )
    return number


def regular(start_h: float, end_h: float, *, booted_h: float = -240, received_h: float | None = None) -> list[Sent]:
    """Return heartbeats every minute between two hours of yesterday."""
    times = [START + start_h * HOUR + n * 60 for n in range(round((end_h - start_h) * 60))]
    return [
        Sent(
            at, at + 1 if received_h is None else START + received_h * HOUR, int(at - START - booted_h * HOUR), True, 80
        )
        for at in times
    ]


async def minutes(conn: Connection, day: date = YESTERDAY) -> dict[str, dict[str, float]]:
    """Return the parts of each device's day that are not 0, in minutes."""
    rows = await conn.fetch(
        "SELECT d.device_id, u.* FROM device_days u JOIN devices d USING (device_no) WHERE day = $1", day
    )
    parts = ("closed", "ours", "heard", "replayed", "off", "unknown")
    return {
        row["device_id"]: {part: row[f"{part}_tenths"] / 10 for part in parts if row[f"{part}_tenths"]} for row in rows
    }


async def test_a_night_makes_the_uptimes_of_yesterday(house: House) -> None:
    conn = house.conn
    await conn.execute("INSERT INTO sites (site, zone, hours) VALUES ('day', 'Europe/Berlin', '08:00-20:00')")
    await conn.execute("INSERT INTO blackouts VALUES ($1, $2)", moment(START + 15 * HOUR), moment(START + 15.25 * HOUR))
    fleet = {
        "up": regular(-1, 27),
        "line down": [*regular(-1, 10), *regular(10, 12, received_h=12), *regular(12, 27)],
        "off": [*regular(-1, 10), *regular(12, 27, booted_h=11.99)],
        "silent": regular(-1, 10),
        "never": [],
    }
    for device_id, sent in fleet.items():
        await store(conn, await add_device(conn, device_id), sent)
    await store(conn, await add_device(conn, "shop", "day"), regular(-1, 27))

    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert await minutes(conn) == {
        "up": {"ours": 15, "heard": 1425},
        "line down": {"ours": 15, "heard": 1304, "replayed": 121},
        "off": {"ours": 15, "heard": 1304.6, "off": 120.4},
        "silent": {"ours": 15, "heard": 599, "unknown": 826},
        "never": {"ours": 15, "unknown": 1425},
        "shop": {"closed": 720, "ours": 15, "heard": 705},
    }
    [row] = await conn.fetch(
        "SELECT * FROM device_days u JOIN devices USING (device_no) WHERE device_id = 'off' AND day = $1", YESTERDAY
    )
    assert (row["flaps"], row["reboots"], row["battery_least"], row["unity_tenths"]) == (1, 1, 80, 13_040)
    before = await conn.fetch("SELECT xmin, * FROM device_days")
    assert "device_days" not in {k for k, v in (await house.nightly()).counts.items() if v}
    assert await conn.fetch("SELECT xmin, * FROM device_days") == before


async def test_hours_are_those_of_the_zone_on_the_day_that_the_clocks_change(house: House) -> None:
    await house.conn.execute("INSERT INTO sites (site, zone, hours) VALUES ('night', 'Europe/Berlin', '00:00-04:00')")
    device = await add_device(house.conn, "kiosk", "night")
    await house.conn.execute(
        "UPDATE devices SET created_at = '2026-03-28', revoked_at = '2026-03-31' WHERE device_no = $1", device
    )
    await house.nightly()
    # In Berlin, 29 March has 23 hours, and its first four begin at 23:00 UTC and last three.
    closed = {day: (await minutes(house.conn, date(2026, 3, day)))["kiosk"]["closed"] for day in (28, 29, 30)}
    assert closed == {28: 20 * 60, 29: 20 * 60, 30: 20 * 60}
    ranges = Place("night", "Europe/Berlin", "00:00-04:00").open_ranges(
        datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 3, 30, tzinfo=UTC)
    )
    assert [(one.end - one.start) / HOUR for one in ranges] == [2, 2]


async def test_postgresql_and_python_agree_with_the_rules_applied_to_each_moment(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query reduces heartbeats to edges; the oracle looks at every heartbeat."""
    rules, random = UptimeRules(), Random(7)  # noqa: S311 - no secret
    place = Place(None)
    sent = {await add_device(house.conn, f"{n}"): history(random, START - DAY) for n in range(8)}
    slow = await add_device(house.conn, "slow clock")
    sent[slow] = [one._replace(received=one.at + 2_400) for one in regular(-26, 10)]
    for number, each in sent.items():
        await store(house.conn, number, each)
    await house.conn.execute(
        "INSERT INTO blackouts VALUES ($1, $2)", moment(START - 20 * HOUR), moment(START - 19 * HOUR)
    )
    devices = [Device(number, CREATED, None, place) for number in sent]
    day = YESTERDAY - timedelta(days=1)
    computed = await device_days.compute(house.conn, DayTable(day, partitions.table_name(day)), devices, rules, NOW)
    circumstances = Circumstances(
        START - DAY, NOW.timestamp(), rules.offline_after_s, place.open_ranges(NOW - timedelta(days=9), NOW),
        [Range(START - 20 * HOUR, START - 19 * HOUR)], CREATED.timestamp(),
    )  # fmt: skip
    begin = START - DAY - rules.offline_after_s - 900
    for number, each in sent.items():
        read = [one for one in each if begin <= one.at < START]
        truth = true_parts(each, circumstances, *usual(read, circumstances, rules.interval_s))
        assert truth is not None
        assert computed[number]._replace(flaps=-1, reboots=-1, is_open=False) == truth
    assert computed[slow].replayed == 0


async def test_a_run_that_is_killed_between_chunks_leaves_the_day_due_and_is_repeated(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_days, "CHUNK_DEVICES", 1)
    for n in range(3):
        await store(house.conn, await add_device(house.conn, f"{n}"), regular(-1, 27))
    await house.killed_at("uptime chunk")
    assert await house.conn.fetchval("SELECT count(*) FROM device_days") == 1
    assert await house.conn.fetchval("SELECT count(*) FROM days_made") == 0
    assert (await house.nightly()).status == "completed"
    assert await minutes(house.conn) == {f"{n}": {"heard": 1440} for n in range(3)}
    assert await house.conn.fetchval("SELECT count(*) FROM days_made WHERE day = $1", YESTERDAY) == 1


async def test_late_heartbeats_make_the_day_anew_and_a_moved_device_keeps_its_place(house: House) -> None:
    conn = house.conn
    await conn.execute("INSERT INTO sites (site, hours) VALUES ('a', '10:00-20:00'), ('b', NULL)")
    device = await add_device(conn, "kiosk", "a")
    await store(conn, device, regular(0, 12))
    await house.nightly()
    assert await minutes(conn) == {"kiosk": {"closed": 840, "heard": 119, "unknown": 481}}
    await conn.execute("UPDATE devices SET site = 'b'; UPDATE sites SET hours = '00:00-01:00' WHERE site = 'a'")
    await store(conn, device, regular(12, 24, received_h=30))
    await store(conn, device, regular(24, 54))
    await house.nightly(NOW + timedelta(days=1))
    assert await minutes(conn) == {"kiosk": {"closed": 840, "heard": 119, "replayed": 481}}
    assert await minutes(conn, NOW.date()) == {"kiosk": {"heard": 1440}}
    rows = await conn.fetch(
        "SELECT site, day FROM device_days JOIN day_places USING (place_no) ORDER BY day DESC LIMIT 2"
    )
    assert [(row["site"], row["day"]) for row in rows] == [("b", NOW.date()), ("a", YESTERDAY)]


async def test_a_silence_that_ends_later_explains_the_days_before(house: House) -> None:
    conn = house.conn
    off, lost = await add_device(conn, "off"), await add_device(conn, "lost its queue")
    for device in (off, lost):
        await store(conn, device, regular(-1, 10))
    await house.nightly()
    await house.nightly(NOW + timedelta(days=1))
    unknown = {"off": {"unknown": 1440}, "lost its queue": {"unknown": 1440}}
    assert (await minutes(conn))["off"] == {"heard": 599, "unknown": 841}
    assert await minutes(conn, NOW.date()) == unknown
    await store(conn, off, regular(50, 51, booted_h=49.9))
    await store(conn, lost, regular(50, 51))
    await house.nightly(NOW + timedelta(days=2))
    assert await minutes(conn) == {"off": {"heard": 599, "off": 841}, "lost its queue": {"heard": 599, "replayed": 841}}
    assert await minutes(conn, NOW.date()) == {"off": {"off": 1440}, "lost its queue": {"replayed": 1440}}


async def test_a_day_whose_uptimes_cannot_be_made_is_not_archived(house: House) -> None:
    await house.fill(OLD)
    await house.conn.execute("INSERT INTO ingest_ledger VALUES ($1, 0, 150, 0)", OLD)
    await house.conn.execute(  # a run of yesterday shows that the clock is right
        "INSERT INTO job_runs (job, started_at, status, host) VALUES ('nightly', $1, 'completed', 'here')",
        NOW - timedelta(days=1),
    )
    await house.conn.execute("ALTER TABLE device_days RENAME COLUMN flaps TO hidden")
    run = await house.nightly()
    assert f"uptime {partitions.table_name(OLD)}" in run.reason
    assert (run.status, (await house.state(OLD))["state"]) == ("failed", "active")
    await house.conn.execute("ALTER TABLE device_days RENAME COLUMN hidden TO flaps")
    assert (await house.nightly()).status == "completed"
    assert (await house.state(OLD))["state"] == "dropped"
    assert len(await minutes(house.conn, OLD)) == 3


async def test_months_are_created_ahead_and_dropped_after_the_retention(house: House) -> None:
    for month in (date(2024, 5, 1), date(2024, 6, 1)):
        await months.ensure(house.conn, month)
    await house.conn.execute("INSERT INTO days_made VALUES ('2024-05-31', 0, now()), ('2024-06-01', 0, now())")
    assert (await house.nightly()).status == "completed"
    names = [
        row["name"] for row in await house.conn.fetch(sql.queries("device_days")["months_before"], "device_days_999912")
    ]
    assert names == ["device_days_202406", "device_days_202606", "device_days_202607"]
    assert await house.conn.fetchval("SELECT min(day) FROM days_made") == date(2024, 6, 1)


async def test_a_row_takes_less_than_100_bytes_with_its_index(conn: Connection) -> None:
    await months.ensure(conn, date(2026, 6, 1))
    await places.numbers(conn, [Place(None)])
    await conn.execute(
        """INSERT INTO device_days SELECT n, '2026-06-01', 1, 0, 0, 14400, 0, 0, 0, 14400, 0, 0,
           CASE WHEN n % 2 = 0 THEN 80 END, false FROM generate_series(1, 20000) n"""
    )
    total = await conn.fetchval("SELECT pg_relation_size('device_days_202606') + pg_indexes_size('device_days_202606')")
    assert total / 20_000 < 100
