"""perf_diff finds a fast read that is wrong, finds none where neither is, and turns the fast reads off in time."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from nexhb import config, devices, flags, log, partitions, perfdiff, reads
from nexhb.config import Ingest, Partitions, Reads, Settings
from nexhb.db import Connection, Database
from nexhb.flags import Flags
from nexhb.jobs import board
from nexhb.perfdiff import Comparison
from nexhb.reads import Offline, OneDevice, Question, UnityDown
from tests.conftest import SOON_S, Nexhb, StartDaemon, example
from tests.integration.test_legacy_reads import either
from tests.proxy import Proxy

ALWAYS = Reads(perf_diff=True, perf_diff_percent=100)
MINUTE = timedelta(minutes=1)
OFFLINE, UNITY_DOWN = Offline(10 * MINUTE, 10_000), UnityDown(10 * MINUTE, 10_000)
LIST = "/v1/devices/offline"
SHORT = Settings(partitions=Partitions(retention_days=4), ingest=Ingest(accept_past=timedelta(days=3)))


async def all_questions(conn: Connection, now: datetime, names: list[str]) -> dict[str, Comparison]:
    """Every question asked both ways."""
    questions: list[Question] = [OFFLINE, UNITY_DOWN, *(OneDevice(name, 10 * MINUTE) for name in names)]
    return {
        getattr(question, "device_id", question.name): await perfdiff.compare(conn, question, now, Settings())
        for question in questions
    }


@pytest.fixture
async def fleet(start_daemon: StartDaemon, now: datetime) -> Nexhb:
    """on (a minute ago), off (an hour), down (a minute, Unity not running), gone (five days)."""
    nexhb = await start_daemon(now=now)
    ages: tuple[tuple[str, timedelta, dict[str, Any]], ...] = (
        ("on", MINUTE, {}), ("off", 60 * MINUTE, {}), ("down", MINUTE, {"unity_process_running": False}),
        ("gone", 5 * 1440 * MINUTE, {}),
    )  # fmt: skip
    for name, age, changes in ages:
        assert (await (await nexhb.agent(name)).live(now - age, **changes)).status == 200
    return nexhb


NAMES = ["on", "off", "down", "gone"]


async def test_a_right_fleet_is_the_same_both_ways(fleet: Nexhb, conn: Connection, now: datetime) -> None:
    found = await all_questions(conn, now, [*NAMES, "nobody"])
    assert {name: (one.fast_rows, one.legacy_rows, one.differ, one.excused) for name, one in found.items()} == {
        "offline": (2, 2, [], 0), "unity_down": (1, 1, [], 0), "nobody": (0, 0, [], 0),
        **{name: (1, 1, [], 0) for name in NAMES},
    }  # fmt: skip
    assert all(one.fast_ms > 0 and one.legacy_ms > 0 for one in found.values())


# ---- what is wrong is found -----------------------------------------------------------------------------------------

STATUS = "UPDATE device_last_status SET {} WHERE device_id = '{}'"
MOVED = "last_ts = last_ts {0}, received_at = received_at {0}, heard_at = heard_at {0}"
WRONG = {
    "a value that nobody sent": (STATUS.format("battery_pct = 1", "off"), {"offline", "off"}),
    "a status that is behind": (STATUS.format(MOVED.format("- interval '1 hour'"), "on"), {"offline", "on"}),
    "a status that is ahead": (STATUS.format(MOVED.format("+ interval '55 minutes'"), "off"), {"offline", "off"}),
    "a status from before the retention": (
        STATUS.format(MOVED.format("- interval '200 days'"), "on"), {"offline", "on"},
    ),
    "content from an hour ago": (STATUS.format("last_ts = last_ts - interval '1 hour'", "on"), {"on"}),
    "a device that was not heard": (STATUS.format("heard_at = heard_at - interval '1 hour'", "on"), {"offline", "on"}),
    "Unity that came back only here": (STATUS.format("unity_running = true", "down"), {"unity_down", "down"}),
    "a status that is missing": ("DELETE FROM device_last_status WHERE device_id = 'gone'", {"offline", "gone"}),
    "one of a device that sent nothing": (
        STATUS.format("device_no = 9, device_id = 'ghost'", "gone"), {"offline", "gone"},
    ),
    "one that is revoked without being so": (STATUS.format("status = 'revoked'", "off"), {"offline", "off"}),
    "one that is inactive without being so": (STATUS.format("status = 'inactive'", "off"), {"offline", "off"}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_last_status_is_found(fleet: Nexhb, conn: Connection, now: datetime, wrong: str) -> None:
    statement, where = WRONG[wrong]
    assert await conn.execute(statement) in ("UPDATE 1", "DELETE 1")
    found = await all_questions(conn, now, NAMES)
    assert {name for name, one in found.items() if one.differ} == where
    assert all(one.differ == [name] for name, one in found.items() if name in NAMES and one.differ)


# ---- what is not wrong is not found ---------------------------------------------------------------------------------

Event = Callable[[Nexhb, Connection, datetime], Awaitable[None]]


async def two_heartbeats_of_one_bucket(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    for ms, pct in ((0, 10.0), (9_000, 20.0)):
        made = (now - 60 * MINUTE).replace(second=0, microsecond=0) + timedelta(milliseconds=ms)
        assert (await agent.live(made, battery={"pct": pct}, unity_process_running=ms == 0)).status == 200


async def a_revoked_device(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await devices.revoke(conn, "off", now)


async def a_device_that_came_back(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await devices.revoke(conn, "off", now)
    await devices.rotate(conn, "off")


async def a_clock_that_is_wrong(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    for year in (1970, 2040):
        assert (await agent.send(datetime(year, 1, 1, tzinfo=UTC))).status == 200


async def a_queue_of_a_clock_that_is_wrong(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """One ts and one arrival: the row is the first of them, the status the last."""
    beats = [example(datetime(1970, 1, 1, hour, tzinfo=UTC), battery={"pct": float(hour)}) for hour in range(5)]
    answer = await (await nexhb.agent("lost")).post(orjson.dumps(beats), "/v1/heartbeats")
    assert (answer.body["written"], answer.body["deduplicated"]) == (1, 4)


async def a_clock_that_is_ahead(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await (await nexhb.agent()).send(now + 4 * MINUTE, unity_process_running=False)


async def a_day_that_is_detached(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await partitions.detach(conn, partitions.name_of((now - 5 * 1440 * MINUTE).date()))


async def a_day_that_is_gone(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await a_day_that_is_detached(nexhb, conn, now)
    await conn.execute(f"DROP TABLE {partitions.name_of((now - 5 * 1440 * MINUTE).date())}")


async def a_late_heartbeat(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Its day is detached; and a day before it is there."""
    day = now - 4 * 1440 * MINUTE
    name = partitions.name_of(day.date())
    await partitions.detach(conn, name)
    await partitions.seal(conn, name, partitions.midnight(day.date()), partitions.midnight(day.date()) + 1440 * MINUTE)
    assert (await (await nexhb.agent("late")).send(day)).status == 200
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 1


async def a_late_heartbeat_whose_day_is_back(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    await a_late_heartbeat(nexhb, conn, now)
    day = (now - 4 * 1440 * MINUTE).date()
    await conn.execute(f"DROP TABLE {partitions.name_of(day)}")
    await conn.execute("DELETE FROM hb_partitions WHERE partition_name = $1", partitions.name_of(day))
    await partitions.ensure(conn, [day])


RIGHT: list[Event] = [
    two_heartbeats_of_one_bucket, a_queue_of_a_clock_that_is_wrong, a_revoked_device, a_device_that_came_back,
    a_clock_that_is_wrong, a_clock_that_is_ahead, a_day_that_is_detached, a_day_that_is_gone, a_late_heartbeat,
    a_late_heartbeat_whose_day_is_back,
]  # fmt: skip


@pytest.mark.parametrize("event", RIGHT, ids=lambda event: event.__name__)
async def test_what_makes_neither_answer_wrong_is_not_held_against_them(
    fleet: Nexhb, conn: Connection, now: datetime, event: Event
) -> None:
    await event(fleet, conn, now)
    names = [row["device_id"] for row in await conn.fetch("SELECT device_id FROM devices")]
    found = await all_questions(conn, now, names)
    assert {name: one.differ for name, one in found.items() if one.differ} == {}


async def test_who_is_silent_beyond_the_retention_may_be_marked_or_not(
    fleet: Nexhb, conn: Connection, now: datetime
) -> None:
    for status in ("ok", "inactive"):
        await conn.execute(STATUS.format(f"status = '{status}'", "gone"))
        for question in (OFFLINE, OneDevice("gone", 10 * MINUTE)):
            found = await perfdiff.compare(conn, question, now, SHORT)
            assert found.differ == []


async def test_what_is_written_between_the_two_queries_differs_not(
    fleet: Nexhb, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = reads.FromHistory.ask

    async def ask_after_a_heartbeat(self: Any, *args: Any) -> Any:
        assert (await (await fleet.agent()).live(now - 60 * MINUTE)).status == 200
        return await plain(self, *args)

    monkeypatch.setattr(reads.FromHistory, "ask", ask_after_a_heartbeat)
    found = await perfdiff.compare(conn, OFFLINE, now, Settings())
    assert (found.fast_rows, found.legacy_rows, found.differ, found.excused) == (2, 2, [], 0)
    assert (await perfdiff.compare(conn, OFFLINE, now, Settings())).fast_rows == 3


# ---- in the daemon --------------------------------------------------------------------------------------------------


async def compared(nexhb: Nexhb, wanted: int, path: str = LIST) -> list[Any]:
    """Ask until so many comparisons are written down."""
    async with asyncio.timeout(SOON_S):
        while len(rows := await nexhb.rows("SELECT * FROM perf_diff_comparisons ORDER BY comparison_no")) < wanted:
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


async def test_too_many_mismatches_turn_the_fast_reads_off_loudly(start_daemon: StartDaemon, now: datetime) -> None:
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
    said = [orjson.loads(line) for line in lines.getvalue().splitlines() if "perf_diff.turned_off" in line]
    assert [(one["level"], one["mismatches"], one["examples"]) for one in said] == [("error", 3, ["kiosk"])]

    # Switched on again by somebody, what was seen before does not count; what is still wrong does.
    seen = len(await nexhb.rows("SELECT FROM perf_diff_comparisons"))
    async with nexhb.database.connected(application="test") as conn:
        await flags.change(conn, {"read_from_last_status": True}, "Ada", nexhb.clock(), Flags())
    rows = await compared(nexhb, seen + 1)
    assert len(await nexhb.rows("SELECT FROM feature_flag_changes WHERE changed_by = 'perf_diff'")) == 1
    async with asyncio.timeout(SOON_S):
        while len(await nexhb.rows("SELECT FROM feature_flag_changes WHERE changed_by = 'perf_diff'")) == 1:
            await other.get(LIST)  # of whichever daemon
    assert len(await nexhb.rows("SELECT FROM perf_diff_comparisons")) >= seen + 3


async def test_mismatches_of_hours_ago_are_not_counted(start_daemon: StartDaemon, now: datetime) -> None:
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


async def test_what_a_clock_that_was_ahead_wrote_down_counts_for_nothing(conn: Connection, now: datetime) -> None:
    """Neither its comparisons, nor its switching on, behind which nothing would count until that time."""

    async def counted() -> int:
        return await perfdiff.mismatches(conn, now - 60 * MINUTE, now + 1440 * MINUTE)

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


async def test_one_is_compared_at_a_time_and_the_others_are_counted(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    nexhb = await start_daemon(reads=ALWAYS)
    await (await nexhb.agent()).live(now - 60 * MINUTE)
    dropped = 'nexhb_perf_diff_comparisons_total{query="offline",result="dropped"}'
    await compared(nexhb, 1)
    async with conn.transaction():
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")  # the comparison hangs behind it
        before, reads_made = await nexhb.metric(dropped), 0
        async with asyncio.timeout(SOON_S):
            while await nexhb.metric(dropped) < before + 5:
                assert (await nexhb.get(LIST))["source"] == "last_status"  # and the callers do not
                reads_made += 1
        waiting = await nexhb.rows("SELECT FROM pg_stat_activity WHERE application_name = 'nexhb perf_diff'")
    assert len(waiting) == 1
    assert reads_made >= 5


async def test_nothing_is_compared_while_the_flag_is_off_or_the_share_says_no(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon()
    for _ in range(10):
        await nexhb.get(LIST)
    assert await nexhb.rows("SELECT FROM perf_diff_comparisons") == []

    settings = Settings(data_dir=Path("/nowhere"), reads=Reads(perf_diff=True, perf_diff_percent=10))
    store = flags.FlagStore(nexhb.database, Flags(perf_diff=True), nexhb.clock)
    taken: list[float] = []
    for fraction in (0.0, 0.0999, 0.1, 0.5, 0.999):
        diff = perfdiff.PerfDiff(nexhb.database, store, settings, nexhb.clock, lambda fraction=fraction: fraction)  # type: ignore[misc]
        diff.offer(OFFLINE)
        if diff._wanted.full():
            taken.append(fraction)
    assert taken == [0.0, 0.0999]


async def test_the_databases_absence_costs_comparisons_and_no_daemon(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(url=proxy.dsn, reads=ALWAYS)
        await compared(nexhb, 1)
        plain = perfdiff.compare

        async def compare_without_a_database(*args: Any) -> Comparison:
            proxy.take_away()
            return await plain(*args)

        monkeypatch.setattr(perfdiff, "compare", compare_without_a_database)
        await either(nexhb, LIST)  # a comparison that still waited may take the database away before it is answered
        failed = 'nexhb_perf_diff_comparisons_total{query="offline",result="failed"}'
        async with asyncio.timeout(SOON_S):
            while not await nexhb.metric(failed):
                pass
        monkeypatch.undo()
        proxy.give_back()
        before = len(await nexhb.rows("SELECT FROM perf_diff_comparisons"))
        async with asyncio.timeout(SOON_S):
            while len(await nexhb.rows("SELECT FROM perf_diff_comparisons")) == before:
                await either(nexhb, LIST)
        assert not nexhb.running.failed.done()


# ---- afterwards -----------------------------------------------------------------------------------------------------


class Quiet(perfdiff.PerfDiff):
    """Comparisons that are none, and take as long as they are said to."""

    took_s = 0.0

    def ready(self) -> Quiet:
        """With an ear for what happens."""
        self.begun: list[float] = []
        self.closed = asyncio.Event()
        return self

    async def _compare(self, question: Question) -> float:
        self.begun.append(asyncio.get_running_loop().time())
        return self.took_s

    async def _disconnect(self) -> None:
        self.closed.set()


async def test_after_a_comparison_comes_a_rest_as_long_and_an_idle_connection_is_given_back(
    database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a reader who asks all the time would have a core compared away."""
    monkeypatch.setattr(perfdiff, "IDLE_S", 0.05)
    store = flags.FlagStore(database, Flags(perf_diff=True), lambda: now)
    settings = Settings(data_dir=Path("/nowhere"), reads=ALWAYS)
    diff = Quiet(database, store, settings, lambda: now, lambda: 0.0).ready()
    diff.took_s = 0.3
    running = asyncio.create_task(diff.run())
    async with asyncio.timeout(SOON_S):
        while len(diff.begun) < 3:
            if not diff._wanted.full():
                diff.offer(OFFLINE)
            await asyncio.sleep(0.01)
        await diff.closed.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert all(later - earlier >= 0.25 for earlier, later in itertools.pairwise(diff.begun))


async def test_the_report_has_both_ways_and_what_differed(database: Database, conn: Connection, now: datetime) -> None:
    for number in range(1, 101):
        await conn.execute(
            """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
            rows_differ, examples, host) VALUES ('offline', $1, $2, $3, 1, 1, $4, $5, 'here')""",
            now - number * MINUTE, number / 100, float(number), int(number == 50), ["kiosk"] if number == 50 else [],
        )  # fmt: skip
    await conn.execute("UPDATE perf_diff_comparisons SET compared_at = $1 WHERE fast_ms = 1", now - timedelta(hours=25))
    found = await perfdiff.report(conn, now - timedelta(hours=24))
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
    process = await asyncio.create_subprocess_exec(
        ".venv/bin/python", "-m", "nexhb", "perf-diff", "report", *(["--json"] if as_json else []),
        env={"DATABASE_URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "PATH": "/usr/bin"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), SOON_S)
    assert process.returncode == 0, output.decode()
    if as_json:
        assert orjson.loads(output)["queries"][0]["speed_up"] == [2000, 2000, 2000]
    else:
        assert "2,000.0 / 2,000.0 / 2,000.0" in output.decode()


async def test_the_nightly_run_drops_what_is_old(
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
    jobs = board.Jobs(database, Settings(data_dir=tmp_path, database=config.Database()), lambda: now)
    assert (await jobs.nightly()).status == "completed"
    assert [row["fast_rows"] for row in await conn.fetch("SELECT fast_rows FROM perf_diff_comparisons")] == [1, 7]
    assert await conn.fetchval("SELECT count(*) FROM feature_flag_changes") == 2
