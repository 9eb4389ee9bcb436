"""The daemon is killed in the middle of scenario 2 and started again: what was acknowledged is in the database."""

from __future__ import annotations

import asyncio

import uvloop

from bench import progress, stack
from bench.finding import Finding, of_trial
from bench.fleet import make_fleet, schedule
from bench.load import agents, target
from bench.scenarios import KillScenario
from bench.trial import Trial, examine

_SEED = 1


def run(scenario: KillScenario) -> Finding:
    """Send, kill, start, go on, compare every row."""
    with stack.running(make_fleet(scenario.devices, _SEED)) as own:
        trial, again_s = uvloop.run(_trial(scenario, own))
    more = {
        "killed": f"at {scenario.duration_s / 3:.0f} s, ready again {again_s:.2f} s later",
        "failed": f"{trial.result.failed} sends without an answer, each sent again",
        "unanswered": f"{trial.check.unanswered} never acknowledged, {trial.check.unanswered_found} of them in",
    }
    return of_trial(scenario.name, scenario.title, trial, **more)


async def _trial(scenario: KillScenario, own: stack.Stack) -> tuple[Trial, float]:
    fleet = make_fleet(scenario.devices, _SEED)
    plan = schedule(scenario.devices, scenario.interval_s, scenario.jitter_s, scenario.duration_s, _SEED)
    with progress.line(len(plan), "heartbeats acknowledged") as show:
        killing = asyncio.create_task(_kill_and_start(own, scenario.duration_s / 3))
        try:
            sent = await agents(
                target(own.url),
                fleet,
                plan=plan,
                bound_s=scenario.duration_s + scenario.drain_s,
                seed=_SEED,
                progress=show,
            )
            again_s = await killing
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
    return await examine(own, fleet, sent, scenario.limits), again_s


async def _kill_and_start(own: stack.Stack, after_s: float) -> float:
    """Kill the daemon, start it again; the seconds from the kill until it could commit."""
    await asyncio.sleep(after_s)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.to_thread(own.kill)
    await asyncio.to_thread(own.start)
    return loop.time() - began
