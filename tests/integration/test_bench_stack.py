"""A daemon of one's own, a load, and the comparison of every row: short, but the whole way."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from bench import history, stack
from bench.check import Check, check, key_of
from bench.fleet import MICROS, make_fleet, schedule
from bench.load import LoadRun, agents, closed_loop, open_loop, recent_span, target
from bench.load.agents import Backoff
from bench.load.batches import Batches, Form, queue
from bench.report import Outcome, SendLog
from bench.trial import examine

FLEET = make_fleet(50, seed=3)
SOON = Backoff(base_s=0.1, cap_s=0.5)


# every send of this file, in order: the daemon remembers what it wrote, so nothing is taken back in between
RECORD = SendLog()


@pytest.fixture(scope="module")
def own() -> Iterator[stack.Stack]:
    """One daemon for all tests of this file, and nothing left of it."""
    with stack.running(FLEET) as running:
        yield running
        folder, pids = running.folder, (running.pid, running.postmaster_pid)
    assert not folder.exists()
    # an orphan that nobody reaps keeps its number, not its program
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_the_folder_is_private_and_the_daemon_can_be_measured(own: stack.Stack) -> None:
    assert stat.S_IMODE(own.folder.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    assert own.memory().peak_mb >= own.memory().rss_mb > 10


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    with pytest.raises(stack.StackError, match="is not empty"), stack.running(data_dir=tmp_path):
        pass


async def test_a_killed_daemon_comes_back_on_its_port_with_every_acknowledged_heartbeat(own: stack.Stack) -> None:
    async def kill_and_restart() -> None:
        await asyncio.sleep(0.7)
        postmaster = own.postmaster_pid
        await asyncio.to_thread(own.kill)
        await asyncio.to_thread(own.start)
        assert own.postmaster_pid == postmaster

    killing = asyncio.create_task(kill_and_restart())
    run = await agents(target(own.url), FLEET, plan=schedule(50, 1, 0, 2, seed=1), bound_s=20, backoff=SOON)
    await killing
    assert run.result.failed > 0
    assert run.result.extra["left"] == 0
    assert (await compared(own, run)).ok


async def test_a_closed_loop_gets_nothing_deduplicated(own: stack.Stack) -> None:
    an_hour_ago_us = (time.time_ns() // 1000) - 3600 * MICROS
    span = recent_span(5_000, len(FLEET), an_hour_ago_us)
    run = await closed_loop(target(own.url), FLEET, connections=8, duration_s=0.6, warm_s=0.2, span=span, pid=own.pid)
    assert (run.result.deduplicated, run.result.refused, run.result.failed) == (0, 0, 0)
    assert run.result.sent > 100
    assert (await compared(own, run)).ok


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_bodies_of_whole_queues_leave_a_row_for_each_heartbeat(own: stack.Stack, form: Form) -> None:
    hours_ago_us = (time.time_ns() // 1000) - {"array": 4, "ndjson": 3}[form] * 3600 * MICROS
    span = recent_span(len(FLEET) * 20, len(FLEET), hours_ago_us)
    requests = Batches(target(own.url), FLEET, [queue(n, FLEET, span, size=20) for n in range(len(FLEET))], form)
    run = await closed_loop(requests.to, FLEET, connections=4, duration_s=5, warm_s=0.01, requests=requests)
    assert (run.result.sent, run.result.ok) == (50, 50)
    before = len(RECORD)
    found = await compared(own, replace(run, sends=requests.heartbeats(run.sends)))
    assert found.ok
    assert len(RECORD) == before + 1_000


async def test_an_open_loop_with_repeated_heartbeats_leaves_one_row_a_bucket(own: stack.Stack) -> None:
    plan = schedule(50, 1, 0.2, 2, seed=2, duplicate_factor=2)
    run = await open_loop(target(own.url), FLEET, plan, settle_s=0)
    assert run.result.deduplicated > 0
    found = await compared(own, run)
    assert found.ok
    assert found.lines[0].expected == found.lines[0].found > 150


async def compared(own: stack.Stack, run: LoadRun) -> Check:
    """The database against this run and all before it."""
    RECORD.extend(run.sends)
    trial = await examine(own, FLEET, replace(run, sends=RECORD), ())
    assert trial.ok == trial.check.ok
    return trial.check


DAMAGE = {
    "a lost row": (0, "missing", "DELETE FROM device_heartbeats WHERE device_no = $1"),
    "a row that nobody sent": (
        0,
        "unexpected",
        "INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong) "
        "SELECT ts - interval '1 h', received_at, device_no, bucket - 3600, label_no, false "
        "FROM device_heartbeats WHERE device_no = $1 LIMIT 1",
    ),
    "a ts that nobody sent": (
        1,
        "unexpected",
        "UPDATE device_heartbeats SET ts = ts + interval '1 microsecond' WHERE device_no = $1",
    ),
    "a row marked as of a wrong clock": (
        2,
        "unexpected",
        "UPDATE device_heartbeats SET clock_wrong = true WHERE device_no = $1",
    ),
    "a status set back": (
        3,
        "missing",
        "UPDATE device_last_status SET last_ts = last_ts - interval '1 s' WHERE device_no = $1",
    ),
    "a status that was never sent": (
        3,
        "unexpected",
        "UPDATE device_last_status SET last_ts = last_ts + interval '1 s' WHERE device_no = $1",
    ),
    "a lost status": (3, "missing", "DELETE FROM device_last_status WHERE device_no = $1"),
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_a_planted_difference_is_found(own: stack.Stack, what: str) -> None:
    line, column, damage = DAMAGE[what]
    async with transaction(own) as conn:
        assert (await check(conn, FLEET, RECORD)).ok
        await conn.execute(damage, await conn.fetchval("SELECT device_no FROM device_heartbeats LIMIT 1"))
        found = await check(conn, FLEET, RECORD)
    assert not found.ok
    assert getattr(found.lines[line], column) >= 1
    assert [n for n, each in enumerate(found.lines) if not each.ok] == [line]


async def test_a_send_that_was_never_answered_may_be_in_and_is_counted(own: stack.Stack) -> None:
    log = SendLog()
    log.extend(RECORD)
    for number in range(len(log)):
        log.outcome[number] = Outcome.FAILED
    async with transaction(own) as conn:
        found = await check(conn, FLEET, log)
    assert found.ok
    assert found.unanswered == found.unanswered_found > 150
    assert found.lines[0].expected == 0


async def test_a_history_made_without_the_daemon_is_read_like_one(own: stack.Stack) -> None:
    async with transaction(own) as conn:
        await conn.execute("DELETE FROM device_heartbeats")
        await conn.execute("DELETE FROM device_last_status")
        writer = await history.Writer.of(conn, FLEET)
        now_us = time.time_ns() // 1000
        for minute in history.minutes_of(len(FLEET), beats=3, interval_s=60, end_us=now_us):
            assert await writer.write(writer.heartbeats(minute)) == len(FLEET)
        await history.fill_last_status(conn)
        rows = await conn.fetch("SELECT device_id, max(ts) AS ts FROM heartbeat_history GROUP BY device_id")
        status = await conn.fetch("SELECT device_id, last_ts AS ts FROM device_last_status")
        assert {device.device_id for device in FLEET} == {row["device_id"] for row in rows}
        assert sorted(map(tuple, rows)) == sorted(map(tuple, status))


@asynccontextmanager
async def transaction(own: stack.Stack) -> AsyncIterator[asyncpg.Connection]:
    """A connection that takes back whatever is done on it."""
    conn = await own.connect()
    outer = conn.transaction()
    await outer.start()
    try:
        yield conn
    finally:
        await outer.rollback()
        await conn.close()


def test_the_record_counts_buckets_as_the_schema_does() -> None:
    assert key_of(0, 1_577_836_800 * MICROS + 19_999_999) == (0, 10)
