"""Scenarios 1 and 2, and the one with duplicates: a fleet on its schedule, in open loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import uvloop

from bench import progress, stack
from bench.finding import Finding, of_trial
from bench.fleet import make_fleet, schedule
from bench.load import open_loop, target
from bench.scenarios import OpenLoopScenario
from bench.trial import Trial, examine

SEED: Final = 1  # of its fleet


def run(scenario: OpenLoopScenario) -> Finding:
    """Send the schedule, compare every row."""
    fleet = make_fleet(scenario.devices, SEED)
    with stack.running(fleet) as own:
        trial = uvloop.run(sent(scenario, own))
    share = trial.result.extra["deduplicated_share"]
    more = {"deduplicated": f"{share:.1%}"} if scenario.duplicate_factor > 1 else {}
    return of_trial(scenario.name, scenario.title, trial, **more)


async def sent(scenario: OpenLoopScenario, own: stack.Stack) -> Trial:
    """The schedule against a daemon that knows the fleet, every row compared."""
    fleet = make_fleet(scenario.devices, SEED)
    plan = schedule(
        scenario.devices,
        scenario.interval_s,
        scenario.jitter_s,
        scenario.duration_s,
        SEED,
        duplicate_factor=scenario.duplicate_factor,
    )
    with progress.line(len(plan), "heartbeats acknowledged") as show:
        run = await open_loop(target(own.url), fleet, plan, pid=own.pid, seed=SEED, progress=show)
    share = run.result.deduplicated / max(1, run.result.ok)
    result = replace(run.result, extra={**run.result.extra, "deduplicated_share": round(share, 4)})
    return await examine(own, fleet, replace(run, result=result), scenario.limits)
