"""`python -m bench outage`: the database away for minutes under agents; what they held is stored, at its own time."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop

from bench import progress, stack, suite
from bench.cost import Sample, watched
from bench.finding import Finding, of_trial
from bench.fleet import BUCKET_US, MICROS, make_fleet, schedule
from bench.load import LoadRun, agents, target
from bench.report import SendLog
from bench.scenarios import OUTAGE, OutageScenario
from bench.trial import Trial, examine
from nexhb import embedded

_SEED: Final = 1
_EVERY_S: Final = 1.0
_POLL_S: Final = 0.02
_READY_BOUND_S: Final = 120.0


def outage(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the database is away.")] = OUTAGE.outage_s / 60,
    devices: Annotated[int, typer.Option(min=1, help="How many agents.")] = OUTAGE.devices,
    out: Annotated[Path | None, typer.Option(help=suite.WHERE)] = None,
) -> None:
    """Take the database away under a fleet of agents, and give it back. Exit 0: every limit was kept."""
    scenario = replace(OUTAGE, devices=devices, outage_s=minutes * 60)
    if scenario != OUTAGE:
        title = f"{devices:,} agents at 60 s ± 15 s, PostgreSQL away for {minutes:g} minutes"
        scenario = replace(scenario, title=title)
    suite.one(scenario.name, scenario.title, partial(run, scenario), suite.where(out, usual=scenario == OUTAGE))


@dataclass(slots=True)
class Ear:
    """What agents hear: when each heartbeat was acknowledged, and how long any answer took."""

    acked_s: array[float] = field(default_factory=lambda: array("d"))
    waited_most_s: float = 0.0

    def hear(self, send_no: int, status: int, waited_s: float) -> None:
        """Note an answer; seconds since 1970."""
        self.waited_most_s = max(self.waited_most_s, waited_s)
        if 200 <= status < 300:
            self.acked_s.extend([math.nan] * (send_no + 1 - len(self.acked_s)))
            self.acked_s[send_no] = time.time()


@dataclass(slots=True)
class Clock:
    """What happened when, in seconds since 1970."""

    away_s: float = math.nan
    back_s: float = math.nan
    ready_s: float = math.nan


class Elsewhere:
    """A PostgreSQL that the bench starts and stops; the daemon knows it by its URL only, and leaves it alone."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._server = embedded.start(data_dir)

    @property
    def dsn(self) -> str:
        """How to reach it; the same after each start."""
        return self._server.dsn

    def stop(self) -> None:
        """As an operator would (fast): sessions are cut off, their transactions rolled back."""
        self._server.stop()

    def start(self) -> None:
        """Until it takes connections."""
        self._server = embedded.start(self._data_dir)


def held_and_drained(sends: SendLog, acked_s: Sequence[float], began_at_s: float, back_s: float) -> list[float]:
    """Of the heartbeats that were made before the database was back and acknowledged only then: the seconds from its
    return to the acknowledgement, in order; infinite for one that never was.

    Schedules count from the bucket in which the run began, so a timestamp lies up to ten seconds in the past.
    """
    shift_s = began_at_s % (BUCKET_US / MICROS)
    found = []
    for send_no, ts_us in enumerate(sends.ts_us):
        acked = acked_s[send_no] if send_no < len(acked_s) else math.nan
        if ts_us / MICROS + shift_s < back_s and not acked < back_s:
            found.append(math.inf if math.isnan(acked) else acked - back_s)
    return sorted(found)


def run(scenario: OutageScenario) -> Finding:
    """Send, take the database away, give it back, wait until no agent holds anything, compare every row."""
    fleet = make_fleet(scenario.devices, _SEED)
    with stack.run_folder() as folder:
        elsewhere = Elsewhere(folder / "elsewhere")
        try:
            with stack.running(fleet, settings={stack.DATABASE_URL: elsewhere.dsn}) as own:
                return uvloop.run(_run(scenario, own, elsewhere))
        finally:
            elsewhere.stop()


async def _run(scenario: OutageScenario, own: stack.Stack, elsewhere: Elsewhere) -> Finding:
    fleet = make_fleet(scenario.devices, _SEED)
    lasts_s = scenario.before_s + scenario.outage_s + scenario.after_s
    plan = schedule(scenario.devices, scenario.interval_s, scenario.jitter_s, lasts_s, _SEED)
    ear, clock = Ear(), Clock()
    async with watched(own.pid, _EVERY_S) as samples:
        with progress.line(len(plan), "heartbeats acknowledged") as show:
            taking = asyncio.create_task(_take_away(scenario, own, elsewhere, clock))
            try:
                sent = await agents(
                    target(own.url),
                    fleet,
                    plan=plan,
                    bound_s=lasts_s + scenario.drain_s,
                    pid=own.pid,
                    seed=_SEED,
                    progress=show,
                    heard=ear.hear,
                )
                await taking
            finally:
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)
    held = held_and_drained(sent.sends, ear.acked_s, sent.began_at_s, clock.back_s)
    growth_mb = _growth(samples, scenario.before_s)
    answers = sent.result.statuses
    extra = {
        "other_answers": sum(number for status, number in answers.items() if status not in ("200", "503")),
        "waited_most_s": round(ear.waited_most_s, 3),
        "ready_s": None if math.isnan(clock.ready_s) else round(clock.ready_s - clock.back_s, 3),
        "held": len(held),
        "growth_mb": growth_mb,
    }
    judged = LoadRun(replace(sent.result, extra={**sent.result.extra, **extra}), sent.sends, sent.began_at_s)
    trial = await examine(own, fleet, judged, scenario.limits)
    return _finding(scenario, trial, clock, held, samples)


async def _take_away(scenario: OutageScenario, own: stack.Stack, elsewhere: Elsewhere, clock: Clock) -> None:
    await asyncio.sleep(scenario.before_s)
    clock.away_s = time.time()
    await asyncio.to_thread(elsewhere.stop)
    await asyncio.sleep(max(0.0, clock.away_s + scenario.outage_s - time.time()))
    await asyncio.to_thread(elsewhere.start)
    clock.back_s = time.time()
    while time.time() - clock.back_s < _READY_BOUND_S:
        if await asyncio.to_thread(own.ready):
            clock.ready_s = time.time()
            return
        await asyncio.sleep(_POLL_S)


def _growth(samples: Sequence[Sample], before_s: float) -> float:
    """MB from the last look before the outage to the highest after it."""
    at_first = max((each.rss_mb for each in samples if each.at_s < before_s), default=samples[0].rss_mb)
    return round(max(each.rss_mb for each in samples) - at_first, 1)


def _finding(
    scenario: OutageScenario, trial: Trial, clock: Clock, held: Sequence[float], samples: Sequence[Sample]
) -> Finding:
    extra, statuses = trial.result.extra, trial.result.statuses
    shares = ", ".join(f"{share:.0%} {held[min(len(held) - 1, int(share * len(held)))]:.1f} s" for share in (0.5, 0.9))
    figures = {
        "away": f"{clock.back_s - clock.away_s:.1f} s, ready again {extra['ready_s']} s after its return",
        "heard": ", ".join(f"{number:,} times {status}" for status, number in sorted(statuses.items()))
        + f", {trial.result.failed} without an answer; the longest wait {extra['waited_most_s']} s",
        "held": f"{len(held):,} heartbeats at its return, all stored {held[-1]:.1f} s later ({shares})"
        if held
        else "nothing at its return",
        "memory": f"{samples[0].rss_mb:g} MB at the start, {max(each.rss_mb for each in samples):g} MB at most",
    }
    found = of_trial(scenario.name, scenario.title, trial, **figures)
    lines = [f"{line.what}: {line.found:,} of {line.expected:,}" for line in trial.check.lines]
    # latencies of an outage are its length: the agents' own waits
    kept = {key: text for key, text in found.figures.items() if key not in ("latency", "daemon")}
    details = {**found.details, "samples": [each._asdict() for each in samples], "drained_s": list(held)}
    return Finding(found.name, found.title, found.verdicts, {**kept, "compared": "; ".join(lines)}, details)
