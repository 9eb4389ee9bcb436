"""perf_diff detects a wrong fast read, reports no mismatch otherwise, and turns the fast reads off in time."""

from __future__ import annotations

import asyncio
import io
import itertools
import subprocess
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from nexhb import config, log, partitions, retirement
from nexhb.config import IngestSettings, PartitionsSettings, ReadsSettings, Settings
from nexhb.devices import registry as device_registry
from nexhb.jobs import registry
from nexhb.postgres.connections import Connection, Database
from nexhb.reading import comparison, flags
from nexhb.reading.comparison import Comparison
from nexhb.reading.flags import Flags
from nexhb.reading.history import HistoryReader
from nexhb.reading.queries import DeviceQuery, OfflineQuery, Query, UnityDownQuery
from tests.conftest import SOON_S, Nexhb, StartDaemon, example
from tests.proxy import Proxy
from tests.support import forks
from tests.support.responses import either

ALWAYS = ReadsSettings(perf_diff=True, perf_diff_percent=100)
MINUTE = timedelta(minutes=1)
OFFLINE, UNITY_DOWN = OfflineQuery(10 * MINUTE, 10_000), UnityDownQuery(10 * MINUTE, 10_000)
LIST = "/v1/devices/offline"
SHORT = Settings(partitions=PartitionsSettings(retention_days=4), ingest=IngestSettings(accept_past=timedelta(days=3)))


async def compare_all(conn: Connection, now: datetime, names: list[str]) -> dict[str, Comparison]:
    """Compare every query."""
    queries: list[Query] = [OFFLINE, UNITY_DOWN, *(DeviceQuery(name, 10 * MINUTE) for name in names)]
    return {
        getattr(query, "device_id", query.name): await comparison.compare(conn, query, now, Settings())
        for query in queries
    }


@pytest.fixture
async def fleet(start_daemon: StartDaemon, now: datetime) -> Nexhb:
    """Provide a daemon with four devices: on (last seen a minute ago), off (an hour ago), down (a minute ago, Unity not
    running) and gone (five days ago)."""
    nexhb = await start_daemon(now=now)
    ages: tuple[tuple[str, timedelta, dict[str, Any]], ...] = (
        ("on", MINUTE, {}), ("off", 60 * MINUTE, {}), ("down", MINUTE, {"unity_process_running": False}),
        ("gone", 5 * 1440 * MINUTE, {}),
    )  # fmt: skip
    for name, age, changes in ages:
        assert (await (await nexhb.agent(name)).live(now - age, **changes)).status == 200
    return nexhb


NAMES = ["on", "off", "down", "gone"]


async def test_both_sources_agree_about_a_correct_fleet(fleet: Nexhb, conn: Connection, now: datetime) -> None:
    found = await compare_all(conn, now, [*NAMES, "nobody"])
    assert {name: (one.fast_rows, one.history_rows, one.mismatches, one.excused) for name, one in found.items()} == {
        "offline": (2, 2, [], 0), "unity_down": (1, 1, [], 0), "nobody": (0, 0, [], 0),
        **{name: (1, 1, [], 0) for name in NAMES},
    }  # fmt: skip
    assert all(one.fast_ms > 0 and one.history_ms > 0 for one in found.values())


# ---- mismatches are detected ----------------------------------------------------------------------------------------

STATUS = "UPDATE device_last_status SET {} WHERE device_id = '{}'"
MOVED = "last_ts = last_ts {0}, received_at = received_at {0}, heard_at = heard_at {0}"
WRONG = {
    "a value that nobody sent": (STATUS.format("battery_pct = 1", "off"), {"offline", "off"}),
    "a status that lags": (STATUS.format(MOVED.format("- interval '1 hour'"), "on"), {"offline", "on"}),
    "a status that is ahead": (STATUS.format(MOVED.format("+ interval '55 minutes'"), "off"), {"offline", "off"}),
    "a status from before the retention": (
        STATUS.format(MOVED.format("- interval '200 days'"), "on"), {"offline", "on"},
    ),
    "content from an hour ago": (STATUS.format("last_ts = last_ts - interval '1 hour'", "on"), {"on"}),
    "a device that was not heard": (STATUS.format("heard_at = heard_at - interval '1 hour'", "on"), {"offline", "on"}),
    "Unity that runs again only in the status": (STATUS.format("unity_running = true", "down"), {"unity_down", "down"}),
    "a status that is missing": ("DELETE FROM device_last_status WHERE device_id = 'gone'", {"offline", "gone"}),
    "a status of a device that sent nothing": (
        STATUS.format("device_no = 9, device_id = 'ghost'", "gone"), {"offline", "gone"},
    ),
    "a status revoked, its device not": (STATUS.format("status = 'revoked'", "off"), {"offline", "off"}),
    "a status inactive, its device not": (STATUS.format("status = 'inactive'", "off"), {"offline", "off"}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_last_status_is_detected(fleet: Nexhb, conn: Connection, now: datetime, wrong: str) -> None:
    statement, where = WRONG[wrong]
    assert await conn.execute(statement) in ("UPDATE 1", "DELETE 1")
    found = await compare_all(conn, now, NAMES)
    assert {name for name, one in found.items() if one.mismatches} == where
    assert all(one.mismatches == [name] for name, one in found.items() if name in NAMES and one.mismatches)


# ---- no false mismatches --------------------------------------------------------------------------------------------

Event = Callable[[Nexhb, Connection, datetime], Awaitable[None]]


async def two_heartbeats_of_one_bucket(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    for ms, pct in ((0, 10.0), (9_000, 20.0)):
        made = (now - 60 * MINUTE).replace(second=0, microsecond=0) + timedelta(milliseconds=ms)
        assert (await agent.live(made, battery={"pct": pct}, unity_process_running=ms == 0)).status == 200


async def a_revoked_device(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await device_registry.revoke(conn, "off", now)


async def a_device_that_came_back(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await device_registry.revoke(conn, "off", now)
    await device_registry.rotate(conn, "off")


async def a_clock_that_is_wrong(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    for year in (1970, 2040):
        assert (await agent.send(datetime(year, 1, 1, tzinfo=UTC))).status == 200


async def a_queue_of_a_clock_that_is_wrong(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """All heartbeats of the queue get one ts and one time of receipt: the history keeps the first of them, the status
    the last."""
    beats = [example(datetime(1970, 1, 1, hour, tzinfo=UTC), battery={"pct": float(hour)}) for hour in range(5)]
    answer = await (await nexhb.agent("lost")).post(orjson.dumps(beats), "/v1/heartbeats")
    assert (answer.body["written"], answer.body["deduplicated"]) == (1, 4)


async def a_clock_that_is_ahead(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await (await nexhb.agent()).send(now + 4 * MINUTE, unity_process_running=False)


async def a_day_that_is_detached(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await retirement.detach(conn, partitions.table_name((now - 5 * 1440 * MINUTE).date()))


async def a_day_that_is_gone(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await a_day_that_is_detached(nexhb, conn, now)
    await conn.execute(f"DROP TABLE {partitions.table_name((now - 5 * 1440 * MINUTE).date())}")


async def a_late_heartbeat(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Send a heartbeat whose day is detached, while an earlier day is attached."""
    day = now - 4 * 1440 * MINUTE
    name = partitions.table_name(day.date())
    await retirement.detach(conn, name)
    await retirement.seal(conn, name, partitions.midnight(day.date()), partitions.midnight(day.date()) + 1440 * MINUTE)
    assert (await (await nexhb.agent("late")).send(day)).status == 200
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 1


async def a_late_heartbeat_whose_day_is_back(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await a_late_heartbeat(nexhb, conn, now)
    day = (now - 4 * 1440 * MINUTE).date()
    await conn.execute(f"DROP TABLE {partitions.table_name(day)}")
    await conn.execute("DELETE FROM hb_partitions WHERE partition_name = $1", partitions.table_name(day))
    await partitions.ensure(conn, [day])


RIGHT: list[Event] = [
    two_heartbeats_of_one_bucket, a_queue_of_a_clock_that_is_wrong, a_revoked_device, a_device_that_came_back,
    a_clock_that_is_wrong, a_clock_that_is_ahead, a_day_that_is_detached, a_day_that_is_gone, a_late_heartbeat,
    a_late_heartbeat_whose_day_is_back,
]  # fmt: skip


@pytest.mark.parametrize("event", RIGHT, ids=lambda event: event.__name__)
async def test_a_difference_for_which_neither_source_is_wrong_is_excused(
    fleet: Nexhb, conn: Connection, now: datetime, event: Event
) -> None:
    await event(fleet, conn, now)
    names = [row["device_id"] for row in await conn.fetch("SELECT device_id FROM devices")]
    found = await compare_all(conn, now, names)
    assert {name: one.mismatches for name, one in found.items() if one.mismatches} == {}


async def test_a_device_silent_beyond_the_retention_may_be_marked_inactive_or_not(
    fleet: Nexhb, conn: Connection, now: datetime
) -> None:
    for status in ("ok", "inactive"):
        await conn.execute(STATUS.format(f"status = '{status}'", "gone"))
        for query in (OFFLINE, DeviceQuery("gone", 10 * MINUTE)):
            found = await comparison.compare(conn, query, now, SHORT)
            assert found.mismatches == []


async def test_a_write_between_the_two_queries_causes_no_mismatch(
    fleet: Nexhb, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HistoryReader.run

    async def run_after_a_heartbeat(self: Any, *args: Any) -> Any:
        assert (await (await fleet.agent()).live(now - 60 * MINUTE)).status == 200
        return await original(self, *args)

    monkeypatch.setattr(HistoryReader, "run", run_after_a_heartbeat)
    found = await comparison.compare(conn, OFFLINE, now, Settings())
    assert (found.fast_rows, found.history_rows, found.mismatches, found.excused) == (2, 2, [], 0)
    assert (await comparison.compare(conn, OFFLINE, now, Settings())).fast_rows == 3


# ---- in the daemon --------------------------------------------------------------------------------------------------


async def compared(nexhb: Nexhb, count: int, path: str = LIST) -> list[Any]:
    """Read until `count` comparisons are stored."""
    async with asyncio.timeout(SOON_S):
        while len(rows := await nexhb.rows("SELECT * FROM perf_diff_comparisons ORDER BY comparison_no")) < count:
            await nexhb.get(path)
    return rows


async def test_each_comparison_is_an_event_a_row_and_a_metric(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(reads=ALWAYS)
    same = 'nexhb_perf_diff_comparisons_total{query="offline",result="same"}'
    before = await nexhb.metric(same)
    await (await nexhb.agent()).live(now - 60 * MINUTE)
    log.setup("info", lines := io.StringIO())
    row = (await compared(nexhb, 1))[0]
    assert (row["query"], row["fast_rows"], row["legacy_rows"], row["rows_differ"]) == ("offline", 1, 1, 0)
    async with asyncio.timeout(SOON_S):
        while await nexhb.metric(same) <= before:
            pass
    for source in ("last_status", "legacy"):
        assert await nexhb.metric(f'nexhb_perf_diff_latency_seconds_count{{query="offline",source="{source}"}}') >= 1
    events = [orjson.loads(line) for line in lines.getvalue().splitlines()]
    event = next(one for one in events if one["event"] == "perf_diff.query_comparison")
    assert event["speed_up"] == pytest.approx(event["legacy_ms"] / event["fast_ms"], rel=0.2, abs=0.1)
    assert (event["fast_rows"], event["legacy_rows"], event["rows_differ"], event["examples"]) == (1, 1, 0, [])


async def test_too_many_mismatches_turn_the_fast_reads_off_with_an_error_in_the_log(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb, other = [await start_daemon(reads=ALWAYS) for _ in range(2)]
    before = await nexhb.metric("nexhb_perf_diff_turned_off_total")
    await (await nexhb.agent("kiosk")).live(now - 60 * MINUTE)
    await nexhb.rows("UPDATE device_last_status SET battery_pct = 1")
    log.setup("info", lines := io.StringIO())
    rows = await compared(nexhb, 3)
    assert [(row["rows_differ"], row["examples"]) for row in rows[:3]] == [(1, ["kiosk"])] * 3
    for one in (nexhb, other):
        async with asyncio.timeout(SOON_S):
            while (await one.get(LIST))["source"] != "legacy":
                pass
    [change] = await nexhb.rows("SELECT * FROM feature_flag_changes WHERE changed_by = 'perf_diff'")
    assert (change["flag"], change["value_from"], change["value_to"]) == ("read_from_last_status", "true", "false")
    assert await nexhb.metric("nexhb_perf_diff_turned_off_total") == before + 1
    turned_off = [orjson.loads(line) for line in lines.getvalue().splitlines() if "perf_diff.turned_off" in line]
    assert [(one["level"], one["mismatches"], one["examples"]) for one in turned_off] == [("error", 3, ["kiosk"])]

    # Once an operator turns the fast reads on again, only new mismatches count.
    seen = len(await nexhb.rows("SELECT FROM perf_diff_comparisons"))
    async with nexhb.database.connected(application="test") as conn:
        await flags.change(conn, {"read_from_last_status": True}, "Ada", nexhb.clock(), Flags())
    rows = await compared(nexhb, seen + 1)
    assert len(await nexhb.rows("SELECT FROM feature_flag_changes WHERE changed_by = 'perf_diff'")) == 1
    async with asyncio.timeout(SOON_S):
        while len(await nexhb.rows("SELECT FROM feature_flag_changes WHERE changed_by = 'perf_diff'")) == 1:
            await other.get(LIST)  # the mismatches of all daemons count
    assert len(await nexhb.rows("SELECT FROM perf_diff_comparisons")) >= seen + 3


async def test_mismatches_older_than_an_hour_do_not_count(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(reads=ALWAYS)
    await (await nexhb.agent("kiosk")).live(now - 60 * MINUTE)
    for _ in range(10):
        await nexhb.rows(
            """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
            rows_differ, examples, host) VALUES ('offline', $1, 1, 1, 1, 1, 1, '{}', 'there')""",
            now - 61 * MINUTE,
        )
    await nexhb.rows("UPDATE feature_flag_changes SET changed_at = $1", now - 300 * MINUTE)
    await nexhb.rows("UPDATE device_last_status SET battery_pct = 1")
    await compared(nexhb, 12)
    assert (await nexhb.get("/ops/flags"))["read_from_last_status"] is True


async def test_times_in_the_future_are_ignored(conn: Connection, now: datetime) -> None:
    """A clock that was ahead may have written the time of a comparison, or that of a change of the flag; mismatches
    before the last change do not count."""

    async def counted() -> int:
        return await comparison.count_mismatches(conn, now - 60 * MINUTE, now + 1440 * MINUTE)

    for minutes, seen in ((2_000, 0), (-61, 0), (-30, 1)):
        await conn.execute(
            """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
            rows_differ, examples, host) VALUES ('offline', $1, 1, 1, 1, 1, 1, '{}', 'there')""",
            now + minutes * MINUTE,
        )
        assert await counted() == seen
    for minutes, seen in ((2_000, 1), (-40, 1), (-20, 0)):
        await conn.execute(
            """INSERT INTO feature_flag_changes (flag, value_from, value_to, changed_at, changed_by)
            VALUES ('read_from_last_status', 'false', 'true', $1, 'Ada')""",
            now + minutes * MINUTE,
        )
        assert await counted() == seen


async def test_one_comparison_runs_at_a_time_and_dropped_ones_are_counted(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    nexhb = await start_daemon(reads=ALWAYS)
    await (await nexhb.agent()).live(now - 60 * MINUTE)
    dropped = 'nexhb_perf_diff_comparisons_total{query="offline",result="dropped"}'
    await compared(nexhb, 1)
    async with conn.transaction():
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")  # comparisons wait for this lock
        before, reads_made = await nexhb.metric(dropped), 0
        async with asyncio.timeout(SOON_S):
            while await nexhb.metric(dropped) < before + 5:
                assert (await nexhb.get(LIST))["source"] == "last_status"  # clients do not wait for the comparison
                reads_made += 1
        waiting = await nexhb.rows("SELECT FROM pg_stat_activity WHERE application_name = 'nexhb perf_diff'")
    assert len(waiting) == 1
    assert reads_made >= 5


async def test_nothing_is_compared_while_the_flag_is_off_or_outside_the_share(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon()
    for _ in range(10):
        await nexhb.get(LIST)
    assert await nexhb.rows("SELECT FROM perf_diff_comparisons") == []

    settings = Settings(data_dir=Path("/nowhere"), reads=ReadsSettings(perf_diff=True, perf_diff_percent=10))
    store = flags.FlagStore(nexhb.database, Flags(perf_diff=True), nexhb.clock)
    offered: list[float] = []
    for fraction in (0.0, 0.0999, 0.1, 0.5, 0.999):
        diff = comparison.PerfDiff(nexhb.database, store, settings, nexhb.clock, lambda fraction=fraction: fraction)  # type: ignore[misc]
        diff.offer(OFFLINE)
        if diff._waiting.full():
            offered.append(fraction)
    assert offered == [0.0, 0.0999]


async def test_an_unavailable_database_costs_comparisons_but_does_not_stop_the_daemon(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(url=proxy.dsn, reads=ALWAYS)
        await compared(nexhb, 1)
        original = comparison.compare

        async def compare_without_a_database(*args: Any) -> Comparison:
            proxy.make_unreachable()
            return await original(*args)

        monkeypatch.setattr(comparison, "compare", compare_without_a_database)
        await either(nexhb, LIST)  # a waiting comparison may make the database unavailable before the response
        failed = 'nexhb_perf_diff_comparisons_total{query="offline",result="failed"}'
        async with asyncio.timeout(SOON_S):
            while not await nexhb.metric(failed):
                pass
        monkeypatch.undo()
        proxy.make_reachable()
        before = len(await nexhb.rows("SELECT FROM perf_diff_comparisons"))
        async with asyncio.timeout(SOON_S):
            while len(await nexhb.rows("SELECT FROM perf_diff_comparisons")) == before:
                await either(nexhb, LIST)
        assert not nexhb.running.tasks.failed.done()


# ---- pauses, reports and clean-up -----------------------------------------------------------------------------------


class StubbedPerfDiff(comparison.PerfDiff):
    """A PerfDiff that compares nothing, and reports a given duration."""

    duration_s = 0.0

    def ready(self) -> StubbedPerfDiff:
        """Start to record events; return this object."""
        self.started: list[float] = []
        self.closed = asyncio.Event()
        self._conn.close = self._note_close  # type: ignore[method-assign]
        return self

    async def _compare(self, query: Query) -> float:
        self.started.append(asyncio.get_running_loop().time())
        return self.duration_s

    async def _note_close(self) -> None:
        self.closed.set()


async def test_a_comparison_is_followed_by_an_equally_long_pause_and_an_idle_connection_is_closed(
    database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a client that reads all the time would make comparisons use a whole core."""
    monkeypatch.setattr(comparison, "IDLE_S", 0.05)
    store = flags.FlagStore(database, Flags(perf_diff=True), lambda: now)
    settings = Settings(data_dir=Path("/nowhere"), reads=ALWAYS)
    diff = StubbedPerfDiff(database, store, settings, lambda: now, lambda: 0.0).ready()
    diff.duration_s = 0.3
    running = asyncio.create_task(diff.run())
    async with asyncio.timeout(SOON_S):
        while len(diff.started) < 3:
            if not diff._waiting.full():
                diff.offer(OFFLINE)
            await asyncio.sleep(0.01)
        await diff.closed.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert all(later - earlier >= 0.25 for earlier, later in itertools.pairwise(diff.started))


async def test_the_report_has_the_times_of_both_sources_and_the_mismatches(
    database: Database, conn: Connection, now: datetime
) -> None:
    for number in range(1, 101):
        await conn.execute(
            """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
            rows_differ, examples, host) VALUES ('offline', $1, $2, $3, 1, 1, $4, $5, 'here')""",
            now - number * MINUTE, number / 100, float(number), int(number == 50), ["kiosk"] if number == 50 else [],
        )  # fmt: skip
    await conn.execute("UPDATE perf_diff_comparisons SET compared_at = $1 WHERE fast_ms = 1", now - timedelta(hours=25))
    found = await comparison.report(conn, now - timedelta(hours=24))
    [row] = found["queries"]
    assert (row["query"], row["comparisons"], row["mismatches"]) == ("offline", 99, 1)
    assert row["fast_ms"] == pytest.approx([0.5, 0.941, 0.9802], rel=1e-3)
    assert row["legacy_ms"] == pytest.approx([50, 94.1, 98.02], rel=1e-3)
    assert row["speed_up"] == pytest.approx([100, 100, 100], rel=1e-3)
    assert [one["examples"] for one in found["last_mismatches"]] == [["kiosk"]]


@pytest.mark.parametrize("as_json", [False, True])
async def test_the_command_shows_the_report(
    database: Database, conn: Connection, tmp_path: Path, as_json: bool
) -> None:
    await conn.execute(
        """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
        rows_differ, examples, host) VALUES ('offline', now(), 0.25, 500, 7, 7, 0, '{}', 'here')"""
    )
    words = ["perf-diff", "report", *(["--json"] if as_json else [])]
    env = {"DATABASE_URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "PATH": "/usr/bin"}
    done = await asyncio.to_thread(forks.run, "nexhb", words, env=env, stderr=subprocess.STDOUT, timeout=SOON_S)
    assert done.returncode == 0, done.stdout
    output = done.stdout
    if as_json:
        assert orjson.loads(output)["queries"][0]["speed_up"] == [2000, 2000, 2000]
    else:
        assert "2,000.0 / 2,000.0 / 2,000.0" in output


@pytest.mark.usefixtures("machine_time")  # a nightly run compares its clock with the database's
async def test_the_nightly_run_deletes_old_comparisons_and_flag_changes(
    database: Database, conn: Connection, tmp_path: Path, now: datetime
) -> None:
    for days in (1, 7, 9):
        await conn.execute(
            """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
            rows_differ, examples, host) VALUES ('offline', $1, 1, 1, $2, 1, 0, '{}', 'here')""",
            now - timedelta(days=days), days,
        )  # fmt: skip
        await conn.execute(
            "INSERT INTO feature_flag_changes (flag, changed_at, changed_by) VALUES ('x', $1, 'y')",
            now - timedelta(days=50 * days),
        )
    jobs = registry.Jobs(database, Settings(data_dir=tmp_path, database=config.DatabaseSettings()), lambda: now)
    assert (await jobs.nightly()).status == "completed"
    assert [row["fast_rows"] for row in await conn.fetch("SELECT fast_rows FROM perf_diff_comparisons")] == [1, 7]
    assert await conn.fetchval("SELECT count(*) FROM feature_flag_changes") == 2
