"""`python -m bench soak`: scenario 2 for as long as asked, the daemon's memory watched all the while."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop

from bench import progress, stack, suite
from bench.cost import Sample, growth_of, trend_of, watched
from bench.finding import Finding, of_trial
from bench.fleet import make_fleet, schedule
from bench.load import open_loop, target
from bench.report import Limit, Verdict, hold
from bench.scenarios import STEADY_2000
from bench.trial import Trial, examine

_NAME: Final = "soak"
_MINUTES: Final = 10.0
_SEED: Final = 1
_EVERY_S: Final = 5.0
# what a start fills (tokens, labels, devices' facts, allocator) is full by then
_SETTLED_S: Final = 180.0
_GROWTH: Final = Limit("growth from the 3rd minute to the end, MB", "growth_mb", 5)
_TREND: Final = Limit("the same by least squares, MB", "trend_mb", 5)


def soak(
    minutes: Annotated[float, typer.Option(min=0.5, help="How long.")] = _MINUTES,
    out: Annotated[Path | None, typer.Option(help=suite.WHERE)] = None,
) -> None:
    """Run scenario 2 for long and see whether the daemon grows. Exit 0: it does not."""
    title = f"{STEADY_2000.title}, for {minutes:g} minutes"
    suite.one(_NAME, title, partial(run, minutes * 60, title), suite.where(out, usual=minutes == _MINUTES))


def run(duration_s: float, title: str) -> Finding:
    """Send, watch, compare every row."""
    samples: list[Sample] = []
    with stack.running(make_fleet(STEADY_2000.devices, _SEED)) as own:
        trial = uvloop.run(_trial(own, duration_s, samples))
    finding = of_trial(_NAME, title, trial)
    settled = [each for each in samples if each.at_s >= min(_SETTLED_S, duration_s / 2)]
    growth_mb, trend_mb = growth_of(settled), trend_of(settled)
    figures = {
        "memory": f"{samples[0].rss_mb:g} MB at the start, {settled[0].rss_mb:g} MB after {settled[0].at_s:.0f} s, "
        f"{samples[-1].rss_mb:g} MB at the end",
        "growth": f"{growth_mb:+.2f} MB, by least squares {trend_mb:+.2f} MB",
    }
    verdicts: tuple[Verdict, ...] = (*finding.verdicts, hold(_GROWTH, growth_mb), hold(_TREND, trend_mb))
    details = {**finding.details, "samples": [each._asdict() for each in samples]}
    return Finding(finding.name, finding.title, verdicts, {**finding.figures, **figures}, details)


async def _trial(own: stack.Stack, duration_s: float, samples: list[Sample]) -> Trial:
    fleet = make_fleet(STEADY_2000.devices, _SEED)
    scenario = replace(STEADY_2000, duration_s=duration_s)
    plan = schedule(scenario.devices, scenario.interval_s, scenario.jitter_s, duration_s, _SEED)
    async with watched(own.pid, _EVERY_S) as seen:
        with progress.line(len(plan), "heartbeats acknowledged") as show:
            sent = await open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, progress=show)
    samples.extend(seen)
    return await examine(own, fleet, sent, scenario.limits)
