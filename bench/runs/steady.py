"""Scenarios 1 and 2, and the one with duplicates: a fleet on its schedule, in open loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import uvloop

from bench import progress, stack
from bench.finding import Finding, of_trial
from bench.fleet import MICROS, Device, make_fleet, schedule
from bench.load import LoadRun, closed_loop, open_loop, recent_span, target
from bench.load.pool import RequestPool
from bench.scenarios import OpenLoopScenario
from bench.trial import Trial, examine, together

SEED: Final = 1  # of its fleet


def run(scenario: OpenLoopScenario) -> Finding:
    """Send the schedule, compare every row."""
    fleet = make_fleet(scenario.devices, SEED)
    with stack.running(fleet) as own:
        trial = uvloop.run(sent(scenario, own))
    share = trial.result.extra["deduplicated_share"]
    more = {"deduplicated": f"{share:.1%}"} if scenario.duplicate_factor > 1 else {}
    return of_trial(scenario.name, scenario.title, trial, **more)


async def sent(scenario: OpenLoopScenario, own: stack.Stack, *, heard_before: bool = False) -> Trial:
    """The schedule against a daemon that knows the fleet, every row compared. `heard_before`: each device was heard
    once, as it is in every minute of a daemon's life but the first (what a device says of itself is written then)."""
    fleet = make_fleet(scenario.devices, SEED)
    plan = schedule(
        scenario.devices,
        scenario.interval_s,
        scenario.jitter_s,
        scenario.duration_s,
        SEED,
        duplicate_factor=scenario.duplicate_factor,
    )
    before = [await _each_once(own, fleet)] if heard_before else []
    with progress.line(len(plan), "heartbeats acknowledged") as show:
        run = await open_loop(target(own.url), fleet, plan, pid=own.pid, seed=SEED, progress=show)
    share = run.result.deduplicated / max(1, run.result.ok)
    result = replace(run.result, extra={**run.result.extra, "deduplicated_share": round(share, 4)})
    return await examine(own, fleet, together([*before, replace(run, result=result)]), scenario.limits)


async def _each_once(own: stack.Stack, fleet: Sequence[Device]) -> LoadRun:
    """A heartbeat of each device, made an hour ago."""
    span = recent_span(len(fleet), len(fleet), time.time_ns() // 1000 - 3_600 * MICROS)
    to = target(own.url)
    return await closed_loop(to, fleet, connections=16, duration_s=30, warm_s=0, requests=RequestPool(to, fleet, span))
