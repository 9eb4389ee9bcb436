"""The bench's own daemon, a load, and the comparison of every row: short, but complete."""

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

from bench import stack
from bench.check import Check, check, key_of
from bench.fleet import MICROS, make_fleet, schedule
from bench.load import Keys, LoadRun, Scheduled, Spliced, agents, stream, target
from bench.load.agents import Backoff
from bench.load.requests import QUEUE, Batches, Form
from bench.report import Outcome, SendLog
from bench.trial import examine

FLEET = make_fleet(50, seed=3)
SOON = Backoff(base_s=0.1, cap_s=0.5)


# Every send of this file, in order. No rows are deleted in between, because the daemon remembers what it wrote.
RECORD = SendLog()


@pytest.fixture(scope="module")
def own() -> Iterator[stack.Stack]:
    """Run one daemon for all tests of this file, and assert that nothing of it is left."""
    with stack.running(FLEET) as running:
        yield running
        folder, pids = running.folder, (running.pid, running.postmaster_pid)
    assert not folder.exists()
    # An orphan that no process has reaped yet keeps its pid, but has no program any more.
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_the_folder_is_private_and_the_daemon_can_be_measured(own: stack.Stack) -> None:
    assert stat.S_IMODE(own.folder.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    assert own.memory().peak_mb >= own.memory().rss_mb > 10


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
    to, keys = target(own.url), Keys(5_000, len(FLEET), time.time() - 3_600)
    requests = Spliced(to, FLEET, keys.holding(5_000))
    run = await stream(to, requests, connections=8, duration_s=0.6, warm_s=0.2, pids=(own.pid,))
    assert (run.result.deduplicated, run.result.refused, run.result.failed) == (0, 0, 0)
    assert run.result.sent > 100
    assert (run.result.daemon_us or 0) > 0
    assert (await compared(own, run)).ok


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_bodies_of_whole_queues_leave_a_row_for_each_heartbeat(own: stack.Stack, form: Form) -> None:
    ago_s = {"array": 8, "ndjson": 4}[form] * 3_600
    buckets = Keys(len(FLEET) * QUEUE, len(FLEET), time.time() - ago_s).buckets(QUEUE)
    requests = Batches(target(own.url), FLEET, buckets, form, range(5))
    run = await stream(requests.to, requests, connections=4, duration_s=5)
    assert (run.result.sent, run.result.ok) == (5, 5)
    before = len(RECORD)
    assert (await compared(own, replace(run, sends=requests.heartbeats(run.sends)))).ok
    assert len(RECORD) == before + 5 * QUEUE


async def test_an_open_loop_with_repeated_heartbeats_leaves_one_row_a_bucket(own: stack.Stack) -> None:
    plan = schedule(50, 1, 0.2, 2, seed=2, duplicate_factor=2)
    to = target(own.url)
    run = await stream(to, Scheduled(to, FLEET, plan), plan.offset_us, duration_s=2)
    assert run.result.deduplicated > 0
    found = await compared(own, run)
    assert found.ok
    assert found.lines[0].expected == found.lines[0].found > 150


async def compared(own: stack.Stack, run: LoadRun) -> Check:
    """Compare the database with this run and all earlier runs."""
    RECORD.extend(run.sends)
    trial = await examine(own, FLEET, replace(run, sends=RECORD), ())
    assert all(verdict.ok for verdict in trial.result.verdicts) == trial.check.ok
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
    assert [n for n, each in enumerate(found.lines) if each.missing or each.unexpected] == [line]


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


@asynccontextmanager
async def transaction(own: stack.Stack) -> AsyncIterator[asyncpg.Connection]:
    """Yield a connection in a transaction that is rolled back at the end."""
    async with own.connected() as conn:
        outer = conn.transaction()
        await outer.start()
        try:
            yield conn
        finally:
            await outer.rollback()


def test_the_record_counts_buckets_as_the_schema_does() -> None:
    assert key_of(0, 1_577_836_800 * MICROS + 19_999_999) == (0, 10)
