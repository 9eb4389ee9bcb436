"""Scenario 4: after an outage the whole fleet is back within a second, each device with a queue to drain."""

from __future__ import annotations

import uvloop

from bench import progress, stack
from bench.finding import Finding, of_trial
from bench.fleet import make_fleet, replays
from bench.load import agents, target
from bench.report import Limit, hold
from bench.scenarios import ReconnectScenario
from bench.trial import Trial, examine

_SEED = 1


def run(scenario: ReconnectScenario) -> Finding:
    """Let the agents drain their queues, compare every row."""
    with stack.running(make_fleet(scenario.devices, _SEED)) as own:
        trial = uvloop.run(_trial(scenario, own))
    drained_s = trial.result.extra["drained_s"]
    every = Limit("rows, each at its own time", "rows", scenario.devices * scenario.queue, "at_least")
    finding = of_trial(
        scenario.name,
        scenario.title,
        trial,
        drained=f"in {drained_s} s, {trial.result.extra['retries']} requests sent again",
    )
    verdicts = (*finding.verdicts, hold(every, trial.check.lines[1].found))
    return Finding(finding.name, finding.title, verdicts, finding.figures, finding.details)


async def _trial(scenario: ReconnectScenario, own: stack.Stack) -> Trial:
    fleet = make_fleet(scenario.devices, _SEED)
    queues = replays(scenario.devices, scenario.interval_s, scenario.queue, scenario.within_s, _SEED)
    with progress.line(scenario.devices * scenario.queue, "heartbeats acknowledged") as show:
        sent = await agents(
            target(own.url), fleet, bound_s=scenario.bound_s, queues=queues, pid=own.pid, seed=_SEED, progress=show
        )
    return await examine(own, fleet, sent, scenario.limits)
