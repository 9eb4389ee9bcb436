"""Scenario 5: as fast as it goes, in rounds that alternate with a handler that only reads the body and answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

import uvloop

from bench import stack
from bench.finding import Finding, others
from bench.fleet import Device, make_fleet
from bench.floors import Orientation, orientation
from bench.load import RATE_BOUND, LoadRun, Span, closed_loop, recent_span, target
from bench.peers import process
from bench.peers.process import Server
from bench.report import ALL_ACKNOWLEDGED, Limit, hold, to_json
from bench.scenarios import CeilingScenario
from bench.trial import Trial, examine, together

_SEED: Final = 1
_CLEAN: Final = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))


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

    def __init__(self, scenario: CeilingScenario, fleet: Sequence[Device], bare: Server, nexhb: Server) -> None:
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

        def one(server: Server, span: Span) -> LoadRun:
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
    with process.running("bare_aiohttp") as bare, stack.running(fleet) as own:
        arena = _Arena(scenario, fleet, bare, Server(own.url, own.pid))
        tried = {each: arena.pair(each, scenario.trial_s, scenario.warm_s / 2) for each in scenario.connections}
        rounds = [arena.pair(scenario.judged_at, scenario.round_s, scenario.warm_s) for _ in range(scenario.rounds)]
        every = together([each.nexhb for each in (*tried.values(), *rounds)])
        trial = uvloop.run(examine(own, fleet, every, _CLEAN))
        least = uvloop.run(_orientation(own))
    return _finding(scenario, tried, rounds, trial, least)


def _finding(
    scenario: CeilingScenario,
    tried: dict[int, _Pair],
    rounds: list[_Pair],
    trial: Trial,
    least: Orientation,
) -> Finding:
    bare = median(each.bare.result.rate_per_s for each in rounds)
    nexhb = median(each.nexhb.result.rate_per_s for each in rounds)
    ratio = round(nexhb / bare, 3)
    daemon_us, postgres_us = (
        round(median(each.nexhb.result.extra[f"window_{whose}_cpu_us"] or 0.0 for each in rounds), 1)
        for whose in ("daemon", "postgres")
    )
    figures = {f"{connections} connections": each.text for connections, each in tried.items()}
    figures |= {f"round {number}": each.text for number, each in enumerate(rounds, 1)}
    figures |= {
        "median": f"{bare:,.0f}/s bare, {nexhb:,.0f}/s nexhb: {ratio:.3f}, at {scenario.judged_at} connections",
        "CPU per heartbeat": f"daemon {daemon_us:g} µs, PostgreSQL {postgres_us:g} µs",
        "same PostgreSQL, one client": f"one-row commit {least.one_row_commit_ms:g} ms, "
        f"SELECT 1 {least.select_1_ms:g} ms",
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
        "orientation": least._asdict(),
        "tried": {str(connections): _as_json(each) for connections, each in tried.items()},
        "rounds": [_as_json(each) for each in rounds],
        "check": trial.check.to_json(),
    }
    verdicts = (hold(scenario.ratio, ratio), *trial.result.verdicts)
    return Finding(scenario.name, scenario.title, verdicts, figures, details)


def _as_json(pair: _Pair) -> dict[str, object]:
    return {"bare": to_json(pair.bare.result), "nexhb": to_json(pair.nexhb.result)}


async def _orientation(own: stack.Stack) -> Orientation:
    conn = await own.connect()
    try:
        return await orientation(conn)
    finally:
        await conn.close(timeout=5)
