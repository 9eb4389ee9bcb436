"""The plans that reads rely on: a day of history reads only that day's partition, and a read of the last
status uses an index.

Each plan is requested from PostgreSQL twice: for the given arguments, and as a connection uses it after it has executed
the statement several times (a prepared statement's generic plan).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from nexhb import partitions
from nexhb.heartbeat import bucket_of
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.reading import filtered as reading_filtered
from nexhb.reading import queries
from nexhb.watching import months
from tests.conftest import TEMPLATE, scratch
from tests.support.clock import START

QUERIES = sql.queries("reads")
NOW = START
TODAY = NOW.date()
DAYS = [TODAY + timedelta(days=offset) for offset in range(-7, 7)]
FULL = DAYS[5:8]  # the day before yesterday, yesterday, today
HISTORY_DEVICES = 50
NO_RANGE = "{}"  # no blackout
ONLINE, OFFLINE, DOWN = 5_000, 50, 25  # every 101st is silent, on every 202nd Unity is down; no device is both


@pytest.fixture(scope="module")
def filled(cluster: str) -> Iterator[str]:
    """Yield the name of a database to copy: 14 days, 3 of them with a heartbeat per minute of 50 devices, and the
    status of 5,050 devices, all of it analysed. Filling the database takes a second of CPU."""
    with asyncio.Runner() as runner:
        context = scratch(cluster, TEMPLATE)
        database = runner.run(context.__aenter__())
        runner.run(_fill(database))
        yield urlsplit(database.dsn).path[1:]
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture
async def fleet(cluster: str, filled: str) -> AsyncIterator[Connection]:
    """Yield a connection to a copy of that database."""
    async with scratch(cluster, filled) as database, database.connected(application="test") as conn:
        yield conn


async def _fill(database: Database) -> None:
    conn = await database.connect(application="test")
    days = await partitions.ensure(conn, DAYS)
    await conn.execute(
        "INSERT INTO devices (device_id, alias) SELECT 'kiosk-' || n, 'Store ' || n FROM generate_series(1, $1::int) n",
        ONLINE + OFFLINE,
    )
    await conn.execute(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
        VALUES ('1.0.9', '2.1.0', 'wifi', 'Store-42')"""
    )
    for day in FULL:
        start = partitions.midnight(day)
        await conn.execute(
            f"""INSERT INTO {days[day]} (ts, received_at, device_no, bucket, label_no, battery_pct, clock_wrong)
            SELECT $1::timestamptz + minute * interval '1 minute', now(), device, $2 + 60 * minute, 1, 50, false
            FROM generate_series(0, 1439) minute, generate_series(1, {HISTORY_DEVICES}) device
            ORDER BY minute, device""",
            start, bucket_of(start, 10),
        )  # fmt: skip
    await conn.execute(
        """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, unity_running)
        SELECT n, 'kiosk-' || n, ts, ts, ts, n % 202 <> 1
        FROM (SELECT n, $2::timestamptz - CASE WHEN n % 101 = 0 THEN interval '1 hour' + n * interval '1 minute'
                                               ELSE (n % 60) * interval '1 second' END AS ts
              FROM generate_series(1, $1::int) n) one""",
        ONLINE + OFFLINE, NOW,
    )  # fmt: skip
    await conn.execute("VACUUM ANALYZE")
    await conn.close()


@dataclass(frozen=True)
class Plan:
    """The output of EXPLAIN (ANALYZE, BUFFERS)."""

    nodes: list[dict[str, Any]]

    @property
    def touched(self) -> set[str]:
        """Return the tables that were actually read."""
        return {node["Relation Name"] for node in self.nodes if "Relation Name" in node and node["Actual Loops"]}

    @property
    def indexes(self) -> set[str]:
        """Return the indexes that were actually used."""
        return {node["Index Name"] for node in self.nodes if "Index Name" in node and node["Actual Loops"]}

    def scans(self, table: str) -> set[str]:
        """Return the types of scans by which a table was read."""
        return {
            node["Node Type"]
            for node in self.nodes
            if node.get("Relation Name", "").startswith(table) and node["Actual Loops"]
        }

    def pulled(self, table: str) -> int:
        """Return the number of rows that were read from a table."""
        return sum(
            round(node["Actual Rows"] * node["Actual Loops"])
            for node in self.nodes
            if node.get("Relation Name", "").startswith(table)
        )

    @property
    def sorted(self) -> int:
        """Return the number of rows that were sorted."""
        return sum(
            round(node["Actual Rows"] * node["Actual Loops"]) for node in self.nodes if node["Node Type"] == "Sort"
        )

    @property
    def rows(self) -> int:
        """Return the number of rows in the result."""
        return int(self.nodes[0]["Actual Rows"])

    @property
    def buffers(self) -> int:
        """Return the number of pages read, from memory or from disk."""
        return int(self.nodes[0]["Shared Hit Blocks"] + self.nodes[0]["Shared Read Blocks"])


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", []):
        yield from _nodes(inner)


async def plan_of(conn: Connection, statement: str, *arguments: object) -> Plan:
    """Return the plan of the statement for these arguments."""
    text = await conn.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *arguments)
    return Plan(list(_nodes(orjson.loads(text)[0]["Plan"])))


async def settled_plan_of(conn: Connection, statement: str, types: str, arguments: Sequence[str]) -> Plan:
    """Return the plan of a prepared statement after 8 executions; from the 6th on, it may be the generic plan."""
    call = f"EXECUTE asked ({', '.join(arguments)})"
    await conn.execute(f"PREPARE asked ({types}) AS {statement}")
    for _ in range(8):
        await conn.execute(call)
    return await plan_of(conn, call)


def quoted(moment: datetime) -> str:
    """Return the moment as an SQL literal."""
    return f"'{moment.isoformat()}'"


ALL = 2**31  # a value greater than every bucket


# ---- history ----------------------------------------------------------------------------------------------------


def check_touches_only(plan: Plan, *days: date) -> None:
    """Check that only these days' partitions were read, each by its key."""
    tables = {partitions.table_name(day) for day in days}
    assert {name for name in plan.touched if name.startswith("device_heartbeats")} == tables
    assert {f"{name}_key" for name in tables} <= plan.indexes
    assert "Seq Scan" not in plan.scans("device_heartbeats")


async def test_a_day_of_history_touches_that_days_partition_and_its_key(fleet: Connection) -> None:
    day = FULL[1]
    start, end = partitions.midnight(day), partitions.midnight(day + timedelta(days=1))
    plan = await plan_of(fleet, QUERIES["history"], 7, start, end, 2_000, ALL)
    check_touches_only(plan, day)
    assert plan.rows == 1_440
    settled = await settled_plan_of(
        fleet, QUERIES["history"], "int, timestamptz, timestamptz, bigint, bigint",
        ["7", quoted(start), quoted(end), "2000", f"{ALL}"],
    )  # fmt: skip
    check_touches_only(settled, day)
    assert settled.rows == 1_440


async def test_a_day_that_begins_at_noon_touches_two_partitions(fleet: Connection) -> None:
    end = partitions.midnight(FULL[1]) + timedelta(hours=12)
    plan = await plan_of(fleet, QUERIES["history"], 7, end - timedelta(days=1), end, 2_000, ALL)
    check_touches_only(plan, FULL[0], FULL[1])
    assert plan.rows == 1_440


async def test_reading_the_newest_heartbeats_of_a_day_reads_only_these_rows(fleet: Connection) -> None:
    start, end = partitions.midnight(FULL[1]), partitions.midnight(FULL[1] + timedelta(days=1))
    few, all_of_it = [await plan_of(fleet, QUERIES["history"], 7, start, end, limit, ALL) for limit in (10, 2_000)]
    assert (few.rows, all_of_it.rows) == (10, 1_440)
    assert few.buffers < 60
    assert few.buffers < all_of_it.buffers / 5
    noon = bucket_of(start + timedelta(hours=12), 10)
    behind = await plan_of(fleet, QUERIES["history"], 7, start, end, 10, noon)
    assert (behind.rows, behind.buffers < 60) == (10, True)


# ---- uptimes ----------------------------------------------------------------------------------------------------

UPTIMES = sql.queries("uptime_reads")
MONTHS = [date(2026, month, 1) for month in (3, 4, 5, 6)]


@pytest.fixture
async def uptimes(fleet: Connection) -> Connection:
    """Return a connection to a database with the uptimes of 400 devices in four months: 48,800 rows."""
    for month in MONTHS:
        await months.ensure(fleet, month)
    await fleet.execute("INSERT INTO day_places (site) VALUES ('a'), ('b')")
    await fleet.execute(
        """INSERT INTO device_days
        SELECT n, day, 1 + n % 2, 0, 0, 14400, 0, 0, 0, 14400, 0, 0, 50, false
        FROM generate_series($1::date, $2::date, interval '1 day') day, generate_series(1, 400) n""",
        MONTHS[0], date(2026, 6, 30),
    )  # fmt: skip
    await fleet.execute("ANALYZE device_days")
    return fleet


async def test_uptimes_of_a_month_touch_only_its_table(uptimes: Connection) -> None:
    arguments = [date(2026, 4, 10), date(2026, 4, 20), [], None, None]
    literals = ["'2026-04-10'", "'2026-04-20'", "'{}'", "NULL", "NULL"]
    plans = [
        await plan_of(uptimes, UPTIMES["by_place"], *arguments),
        await settled_plan_of(uptimes, UPTIMES["by_place"], "date, date, date[], int[], int[]", literals),
        await plan_of(uptimes, UPTIMES["devices_at"], *arguments[:2], [1]),
    ]
    for plan in plans:
        assert {name for name in plan.touched if name.startswith("device_days")} == {"device_days_202604"}
        assert plan.pulled("device_days") <= 4_000


async def test_uptimes_of_a_page_of_devices_are_probed_by_day_and_device(uptimes: Connection) -> None:
    days = [date(2026, 4, 29) + timedelta(days=n) for n in range(4)]
    literal = f"'{{{','.join(map(str, days))}}}'"
    for plan in (
        await plan_of(uptimes, UPTIMES["by_device"], days, [7, 8, 9], None),
        await settled_plan_of(uptimes, UPTIMES["by_device"], "date[], int[], int[]", [literal, "'{7,8,9}'", "NULL"]),
    ):
        assert plan.rows == 3
        assert {name for name in plan.touched if name.startswith("device_days")} == {
            "device_days_202604", "device_days_202605",
        }  # fmt: skip
        assert "Seq Scan" not in plan.scans("device_days")
        assert plan.pulled("device_days") <= 3 * len(days)


# ---- the last status --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["offline_all", "offline"])
async def test_the_list_of_offline_devices_is_read_by_slot_and_reads_few_pages(fleet: Connection, query: str) -> None:
    cutoff = NOW - timedelta(minutes=10)
    place = () if query == "offline_all" else queries.FIRST_POSITION
    plan = await plan_of(fleet, QUERIES[query], cutoff, NO_RANGE, 10_000, *place)
    settled = await settled_plan_of(
        fleet, QUERIES[query], "timestamptz, text, bigint" + (", timestamptz, text" if place else ""),
        [quoted(cutoff), "'{}'", "10000"] + ([quoted(place.heard_at), "''"] if place else []),
    )  # fmt: skip
    pages = await fleet.fetchval("SELECT pg_relation_size('device_last_status') / 8192")
    assert pages > 60
    for one in (plan, settled):
        assert one.rows == OFFLINE
        assert "device_last_status_slot" in one.indexes
        assert "Seq Scan" not in one.scans("device_last_status")
        # In the worst case, each of the 50 devices costs two or three pages of the index of devices and one page of the
        # table.
        assert one.buffers < 5 * OFFLINE


async def test_counting_offline_devices_reads_by_slot(fleet: Connection) -> None:
    """The count covers all offline devices, however few devices the request asks for, and uses the index."""
    plan = await plan_of(fleet, QUERIES["offline"], NOW - timedelta(minutes=10), NO_RANGE, 1, *queries.FIRST_POSITION)
    assert plan.rows == 1
    assert plan.indexes == {"device_last_status_slot"}
    assert "Seq Scan" not in plan.scans("device_last_status")
    assert plan.buffers < 4 * OFFLINE + 5  # the row of each offline device


async def test_a_later_page_of_the_offline_devices_begins_at_its_slot(fleet: Connection) -> None:
    """A later page does not read the devices of the pages before it."""
    cutoff = NOW - timedelta(minutes=10)
    rows = await fleet.fetch(QUERIES["offline"], cutoff, NO_RANGE, OFFLINE, *queries.FIRST_POSITION)
    last = rows[-2]
    plan = await plan_of(fleet, QUERIES["offline"], cutoff, NO_RANGE, 10, last["heard_at"], last["device_id"])
    assert plan.rows == 1
    assert "Seq Scan" not in plan.scans("device_last_status")


def filtered(query: queries.StatusQuery, heard_in: str, slot: int, numbers: list[int] | None = None) -> list[object]:
    """Return the arguments of the statement `filtered`."""
    return ["ok", [heard_in], slot, query.unity_down, numbers, query.among.text, query.among.battery_below,
            None, None, None, None, None, query.sort, *query.after, query.limit, query.counted]  # fmt: skip


async def test_a_filtered_list_uses_the_index_of_its_list_and_reads_the_table_once_otherwise(fleet: Connection) -> None:
    """Each page of /v1/devices?battery_below= is one scan; the filter of a list of silent devices reads these only."""
    among = queries.DeviceFilter(battery_below=20)
    cutoff = NOW - timedelta(minutes=10)
    before, slot = f"{{(,{cutoff.isoformat()})}}", int(cutoff.timestamp() // 300)
    async with reading_filtered.snapshot(fleet):
        whole = queries.StatusQuery(1_000, among, "battery_pct", counted=False)
        plan = await plan_of(fleet, QUERIES["filtered"], *filtered(whole, "{(,)}", 2**31 - 1))
        assert (
            sum(node.get("Relation Name") == "device_last_status" and node["Actual Loops"] for node in plan.nodes) == 1
        )
        silent = queries.StatusQuery(1_000, queries.DeviceFilter(text="kiosk"), "device_id", counted=True)
        plan = await plan_of(fleet, QUERIES["filtered"], *filtered(silent, before, slot))
        assert (plan.rows, plan.indexes, "Seq Scan" in plan.scans("device_last_status")) == (
            OFFLINE, {"device_last_status_slot"}, False,
        )  # fmt: skip
        down = queries.StatusQuery(1_000, queries.DeviceFilter(text="kiosk"), "device_id", unity_down=True)
        plan = await plan_of(fleet, QUERIES["filtered"], *filtered(down, "{(,)}", 2**31 - 1))
        assert (plan.rows, plan.indexes) == (DOWN, {"device_last_status_unity_down"})
        plan = await plan_of(fleet, QUERIES["filtered"], *filtered(silent, "{(,)}", 2**31 - 1, [5, 6, 7]))
        assert (plan.rows, plan.indexes) == (3, {"device_last_status_pkey"})


@pytest.mark.parametrize("query", ["unity_down_all", "unity_down"])
async def test_the_list_of_unity_down_uses_its_own_index_and_reads_few_pages(fleet: Connection, query: str) -> None:
    since = NOW - timedelta(hours=24)
    place = () if query == "unity_down_all" else queries.LAST_POSITION
    plan = await plan_of(fleet, QUERIES[query], since, 10_000, *place)
    settled = await settled_plan_of(
        fleet, QUERIES[query], "timestamptz, bigint" + (", timestamptz, text" if place else ""),
        [quoted(since), "10000"] + ([quoted(place.heard_at), "''"] if place else []),
    )  # fmt: skip
    for one in (plan, settled):
        assert one.rows == DOWN
        assert "device_last_status_unity_down" in one.indexes
        assert "Seq Scan" not in one.scans("device_last_status")
        assert one.buffers < 5 * DOWN


async def test_one_device_is_found_by_its_key(fleet: Connection) -> None:
    plan = await plan_of(fleet, QUERIES["device"], "kiosk-77")
    assert plan.rows == 1
    assert plan.indexes == {"devices_device_id_key", "device_last_status_pkey"}
    assert plan.buffers < 12


async def test_reading_a_page_of_devices_reads_only_its_rows(fleet: Connection) -> None:
    plan = await plan_of(fleet, QUERIES["device_page"], "kiosk-2", 101)
    assert plan.rows == 101
    assert "devices_device_id_key" in plan.indexes
    assert "Seq Scan" not in plan.scans("devices")
    plan = await plan_of(fleet, QUERIES["statuses"], list(range(1000, 1101)))
    assert (plan.rows, plan.indexes) == (101, {"device_last_status_pkey"})


async def test_a_fleet_without_sites_pays_nothing_for_the_sites_of_a_list(fleet: Connection) -> None:
    plan = await plan_of(fleet, QUERIES["sites_of"], list(range(1, 5_001)))
    assert (plan.rows, plan.indexes) == (0, {"devices_site"})
    assert plan.buffers < 4


async def test_the_lists_of_a_site_read_only_its_devices(fleet: Connection) -> None:
    await fleet.execute("INSERT INTO sites (site) VALUES ('store-1')")
    await fleet.execute("UPDATE devices SET site = 'store-1' WHERE device_no % 202 = 0")
    await fleet.execute("ANALYZE devices")
    plan = await plan_of(fleet, QUERIES["numbers"], ["store-1"], None, None)
    assert plan.indexes == {"devices_site"}
    numbers = await fleet.fetchval(QUERIES["numbers"], ["store-1"], None, None)
    cutoff = NOW - timedelta(minutes=10)
    for query, condition, place in (
        ("offline_among", (cutoff, NO_RANGE), queries.FIRST_POSITION),
        ("unity_down_among", (NOW - timedelta(hours=24),), queries.LAST_POSITION),
    ):
        plan = await plan_of(fleet, QUERIES[query], *condition, 100, *place, numbers)
        assert plan.indexes <= {"device_last_status_pkey", "device_last_status_unity_down"}
        assert "Seq Scan" not in plan.scans("device_last_status")


# ---- reconciling the last status --------------------------------------------------------------------------------


async def test_reconcile_finds_each_devices_newest_heartbeat_by_its_key(fleet: Connection) -> None:
    heal, since, until = sql.queries("reconcile")["heal"], NOW - timedelta(days=1), NOW + timedelta(days=1)
    plan = await plan_of(fleet, heal, 0, 2**31 - 1, HISTORY_DEVICES, since, until, 1_000, True)
    settled = await settled_plan_of(
        fleet, heal, "int, int, bigint, timestamptz, timestamptz, bigint, bool",
        ["0", "2147483647", str(HISTORY_DEVICES), quoted(since), quoted(until), "1000", "true"],
    )  # fmt: skip
    heap = await fleet.fetchval(
        "SELECT sum(pg_relation_size(relid)) / 8192 FROM pg_partition_tree('device_heartbeats')"
    )
    assert heap > 1_500
    for one in (plan, settled):
        check_touches_only(one, FULL[1], FULL[2], TODAY + timedelta(days=1))
        assert one.scans("device_heartbeats") == {"Index Scan"}
        # For each device, the query reads the newest heartbeat of each partition, and uses the newest of these: two of
        # the three partitions have heartbeats. For a wrong status, it also reads the last two hours; after the first
        # plan has run, no status is wrong.
        looked_through = 121 if one is plan else 0
        assert one.pulled("device_heartbeats") <= (2 + looked_through) * HISTORY_DEVICES
        assert one.sorted <= 4 * HISTORY_DEVICES  # the few wrong statuses, sorted for the lock order
        assert "Seq Scan" not in one.scans("devices") | one.scans("device_last_status")
    # Pages per device: two of each partition's key and one of its table, one of the empty day, and those of the status
    # by its key. The rest is for repairs.
    assert settled.buffers < 15 * HISTORY_DEVICES


async def test_for_a_silent_device_reconcile_reads_no_older_partitions_than_necessary(fleet: Connection) -> None:
    """The device's heartbeats of yesterday are all older than 24 hours, but the query does read the partition that has
    them."""
    silent_since = partitions.midnight(FULL[1]) + timedelta(hours=18)
    for day in FULL[1:]:
        await fleet.execute(f"DELETE FROM {partitions.table_name(day)} WHERE ts >= $1", silent_since)
    await fleet.execute("VACUUM ANALYZE")
    now = silent_since + timedelta(hours=26)
    heal, since, until = sql.queries("reconcile")["heal"], now - timedelta(days=1), now + timedelta(days=1)
    plan = await plan_of(fleet, heal, 0, 2**31 - 1, HISTORY_DEVICES, since, until, 1_000, False)
    assert plan.pulled("device_heartbeats") == 0
    assert plan.buffers < 15 * HISTORY_DEVICES


# ---- queries by hand --------------------------------------------------------------------------------------------


async def test_the_two_queries_of_the_old_system_run_unchanged(fleet: Connection) -> None:
    async with fleet.transaction():  # one NOW() for all statements
        await fleet.execute("UPDATE device_last_status SET last_ts = last_ts + (now() - $1)", NOW)
        silent = await fleet.fetch("SELECT * FROM device_last_status WHERE last_ts < NOW() - INTERVAL '10 minutes'")
        now = await fleet.fetchval("SELECT now()")
    every = await fleet.fetch("SELECT device_no, last_ts FROM device_last_status")
    expected = {row["device_no"] for row in every if now - row["last_ts"] > timedelta(minutes=10)}
    assert {row["device_no"] for row in silent} == expected
    assert len(expected) == OFFLINE
    down = await fleet.fetch("SELECT * FROM device_last_status WHERE unity_running = false")
    assert sorted(row["device_no"] for row in down) == list(range(1, ONLINE + OFFLINE, 202))
    columns = {
        "device_id", "last_ts", "battery_pct", "network_type", "ssid", "unity_running", "signal_dbm", "agent_version",
        "ip", "status",
    }  # fmt: skip
    assert columns <= set(down[0].keys())


async def test_history_is_readable_by_device_id_with_every_column(fleet: Connection) -> None:
    rows = await fleet.fetch(
        "SELECT * FROM heartbeat_history WHERE device_id = 'kiosk-7' AND ts >= $1 ORDER BY ts LIMIT 1",
        partitions.midnight(FULL[0]),
    )
    assert rows[0]["agent_version"] == "1.0.9"
    columns = await fleet.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'device_heartbeats'::regclass AND attnum > 0"
    )
    assert {row["attname"] for row in columns} - {"label_no"} <= set(rows[0].keys())


OF_PLAIN_TABLES = (
    "restore_devices",
    "restore_strangers",
    "restore_labels",
    "plain_again",
)  # in these queries, `$table` has an archive's columns


async def test_postgresql_accepts_every_query(conn: Connection) -> None:
    await conn.execute(sql.queries("migrate")["journal"])
    await conn.execute(sql.queries("staging")["stage_table"])
    await conn.execute(sql.queries("devices")["import_table"].replace("ON COMMIT DROP", ""))
    await conn.execute(sql.queries("archive")["late_day"])
    await conn.execute(sql.queries("archive")["make_plain"].replace("$table", "plain"))
    await conn.execute(sql.queries("archive")["make_packed"])
    for path in (sql.root() / "queries").glob("*.sql"):
        if path.stem == "nexmdm":
            continue  # queries of the old system: tests/acceptance/test_import_legacy.py
        for name, text in sql.queries(path.stem).items():
            table = "plain" if name in OF_PLAIN_TABLES else "device_heartbeats"
            statement = text.replace("$table", table).replace("$plain", "plain").replace("$rows", "plain")
            statement = statement.replace("$packed", "nexhb_packed").replace("$bucket_seconds", "10")
            statement = statement.replace("$added", "").replace("$columns", "*")
            if not statement.startswith(("CREATE", "SET")):
                assert await conn.prepare(statement), f"{path.stem}.{name}"
    for statement in sql.history_reads().values():
        assert await conn.prepare(statement)


async def test_the_queries_of_the_old_system_return_the_same_devices(fleet: Connection) -> None:
    """NexMDM's query with a window function over the history and nexhb's query of the index return the same offline
    devices."""
    await fleet.execute(
        """UPDATE device_last_status SET last_ts = newest, heard_at = newest FROM
        (SELECT device_no AS n, max(ts) AS newest FROM device_heartbeats GROUP BY device_no) h WHERE device_no = n"""
    )
    cutoff = partitions.midnight(FULL[2]) + timedelta(hours=23, minutes=58, seconds=30)
    await fleet.execute("DELETE FROM device_last_status WHERE device_no > $1", HISTORY_DEVICES)
    await fleet.execute(f"DELETE FROM {partitions.table_name(FULL[2])} WHERE device_no <= 3 AND ts > $1", cutoff)
    await fleet.execute("UPDATE device_last_status SET heard_at = heard_at - interval '1 minute', "
                        "last_ts = last_ts - interval '1 minute' WHERE device_no <= 3")  # fmt: skip
    old = await fleet.fetch(sql.history_reads()["offline"], cutoff)
    new = await fleet.fetch(QUERIES["offline"], cutoff, NO_RANGE, 10_000, *queries.FIRST_POSITION)
    assert {(row["device_id"], row["last_ts"]) for row in old} == {(row["device_id"], row["last_ts"]) for row in new}
    assert len(old) == 3
