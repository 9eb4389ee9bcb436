"""Scenario 5: as fast as it goes, in rounds that alternate with a handler that only reads the body and answers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import asyncpg
import uvloop

from bench import stack
from bench.finding import Finding, others
from bench.fleet import Device, make_fleet
from bench.load import RATE_BOUND, LoadRun, Span, closed_loop, recent_span, target
from bench.report import ALL_ACKNOWLEDGED, Limit, Result, SendLog, hold, to_json
from bench.scenarios import CeilingScenario
from bench.trial import Trial, examine

_SEED: Final = 1
_START_S: Final = 10.0
_CLEAN: Final = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
_MICROS: Final = 1_000_000


class _Server(NamedTuple):
    url: str
    pid: int


class Cost(NamedTuple):
    """CPU µs that one heartbeat took."""

    daemon_us: float
    postgres_us: float


class Orientation(NamedTuple):
    """What the same PostgreSQL takes for the least there is to do, one client, medians in ms."""

    one_row_commit_ms: float
    select_1_ms: float


class _Pair(NamedTuple):
    """One round: first the bare handler, then nexhb."""

    bare: LoadRun
    nexhb: LoadRun

    @property
    def text(self) -> str:
        """Both rates."""
        return f"{self.bare.result.rate_per_s:,.0f}/s bare, {self.nexhb.result.rate_per_s:,.0f}/s nexhb"


class _Arena:
    """Both servers, the fleet, and the buckets that are left for the rounds."""

    def __init__(self, scenario: CeilingScenario, fleet: Sequence[Device], bare: _Server, nexhb: _Server) -> None:
        number = len(scenario.connections) + scenario.rounds
        now_us = time.time_ns() // 1000
        requests = round(RATE_BOUND * scenario.round_s) * number
        # a stretch for each round, each newer than the last, all of them just past
        self._spans = iter(recent_span(requests, len(fleet), now_us).parts(number))
        # the bare handler keeps nothing: any keys will do, if only they last at three times the rate
        self._any_span = recent_span(3 * round(RATE_BOUND * scenario.round_s), len(fleet), now_us)
        self._fleet, self._bare, self._nexhb = fleet, bare, nexhb

    def pair(self, connections: int, duration_s: float, warm_s: float) -> _Pair:
        """Both, one after the other, in the same way."""

        def one(server: _Server, span: Span) -> LoadRun:
            return uvloop.run(
                closed_loop(
                    target(server.url),
                    self._fleet,
                    connections=connections,
                    duration_s=duration_s,
                    warm_s=warm_s,
                    span=span,
                    pid=server.pid,
                )
            )

        return _Pair(one(self._bare, self._any_span), one(self._nexhb, next(self._spans)))


def run(scenario: CeilingScenario) -> Finding:
    """Try each number of connections, run the rounds at one of them, compare every row."""
    fleet = make_fleet(scenario.devices, _SEED)
    with _bare() as bare, stack.running(fleet) as own:
        arena = _Arena(scenario, fleet, bare, _Server(own.url, own.pid))
        tried = {each: arena.pair(each, scenario.trial_s, scenario.warm_s / 2) for each in scenario.connections}
        rounds = [arena.pair(scenario.judged_at, scenario.round_s, scenario.warm_s) for _ in range(scenario.rounds)]
        every = _all_of([each.nexhb for each in (*tried.values(), *rounds)])
        trial = uvloop.run(examine(own, fleet, every, _CLEAN))
        orientation = uvloop.run(_orientation(own))
    return _finding(scenario, tried, rounds, trial, orientation)


def _all_of(runs: Sequence[LoadRun]) -> LoadRun:
    """The last result, with the counts and the record of all of them: the database holds them all."""
    record = SendLog()
    for each in runs:
        record.extend(each.sends)
    counts = {
        name: sum(getattr(each.result, name) for each in runs)
        for name in ("sent", "ok", "refused", "failed", "deduplicated")
    }
    return LoadRun(replace(runs[-1].result, **counts), record)


def _finding(
    scenario: CeilingScenario,
    tried: dict[int, _Pair],
    rounds: list[_Pair],
    trial: Trial,
    orientation: Orientation,
) -> Finding:
    bare = median(each.bare.result.rate_per_s for each in rounds)
    nexhb = median(each.nexhb.result.rate_per_s for each in rounds)
    ratio = round(nexhb / bare, 3)
    costs = [_cost(each.nexhb.result) for each in rounds]
    daemon_us, postgres_us = (round(median(each), 1) for each in zip(*costs, strict=True))
    figures = {f"{connections} connections": each.text for connections, each in tried.items()}
    figures |= {f"round {number}": each.text for number, each in enumerate(rounds, 1)}
    figures |= {
        "median": f"{bare:,.0f}/s bare, {nexhb:,.0f}/s nexhb: {ratio:.3f}, at {scenario.judged_at} connections",
        "CPU per heartbeat": f"daemon {daemon_us:g} µs, PostgreSQL {postgres_us:g} µs",
        "same PostgreSQL, one client": f"one-row commit {orientation.one_row_commit_ms:g} ms, "
        f"SELECT 1 {orientation.select_1_ms:g} ms",
        "rows": f"{trial.check.lines[0].found:,} found, {trial.check.lines[0].expected:,} expected",
        "daemon": f"{trial.memory.rss_mb:g} MB",
        **others(*(run.result for each in rounds for run in each)),
    }
    details = {
        "bare_rate_per_s": bare,
        "nexhb_rate_per_s": nexhb,
        "ratio": ratio,
        "daemon_cpu_us_per_heartbeat": daemon_us,
        "postgres_cpu_us_per_heartbeat": postgres_us,
        "orientation": orientation._asdict(),
        "tried": {str(connections): _as_json(each) for connections, each in tried.items()},
        "rounds": [_as_json(each) for each in rounds],
        "check": trial.check.to_json(),
    }
    verdicts = (hold(scenario.ratio, ratio), *trial.result.verdicts)
    return Finding(scenario.name, scenario.title, verdicts, figures, details)


def _as_json(pair: _Pair) -> dict[str, object]:
    return {"bare": to_json(pair.bare.result), "nexhb": to_json(pair.nexhb.result)}


def _cost(result: Result) -> Cost:
    """Of the steady window. PostgreSQL is the daemon's child, so the tree's CPU less its own."""
    sends = result.extra["window_sends"] or 1
    daemon_s, tree_s = result.server_cpu_s or 0.0, result.server_tree_cpu_s or 0.0
    return Cost(daemon_s * _MICROS / sends, (tree_s - daemon_s) * _MICROS / sends)


# ── what it is measured against ──────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _bare() -> Iterator[_Server]:
    """The bare handler, as a process of its own."""
    port = stack.free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.peers.bare_aiohttp", "--port", str(port)],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_S
        while not _listens(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise stack.StackError("the bare handler did not start")
            time.sleep(0.02)
        yield _Server(f"http://127.0.0.1:{port}", child.pid)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


async def _orientation(own: stack.Stack, times: int = 500) -> Orientation:
    conn = await own.connect()
    try:
        await conn.execute("CREATE TABLE bench_commit (n integer)")
        commit = await _median_ms(conn, "INSERT INTO bench_commit VALUES (1)", times)
        return Orientation(commit, await _median_ms(conn, "SELECT 1", times))
    finally:
        await conn.execute("DROP TABLE IF EXISTS bench_commit")
        await conn.close(timeout=5)


async def _median_ms(conn: asyncpg.Connection, statement: str, times: int) -> float:
    prepared, took = await conn.prepare(statement), []
    for _ in range(times):
        began = time.perf_counter()
        await prepared.fetch()
        took.append(time.perf_counter() - began)
    return round(median(took) * 1e3, 3)
