"""Scenarios 1 and 2: a fleet on its schedule in open loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import uvloop

from bench import stack
from bench.finding import Finding
from bench.fleet import make_fleet, schedule
from bench.report import ALL_ACKNOWLEDGED, FLOORS, Limit
from bench.runs import Plan, Say
from bench.trial import SEED, Trial, examine, send


@dataclass(frozen=True)
class Steady(Plan):
    """A fleet on its schedule."""

    QUICK: ClassVar = {"duration_s": 15.0}

    name: str = "2-steady-2000"
    title: str = "2,000 devices at 60 s ± 15 s"
    devices: int = 2000
    interval_s: float = 60
    jitter_s: float = 15
    duration_s: float = 60
    limits: tuple[Limit, ...] = (
        *ALL_ACKNOWLEDGED,
        Limit("p50 at most 3 ms", "p50_ms", 3),
        Limit("p99 at most 20 ms", "p99_ms", 20),
        Limit("daemon below 120 MB", "daemon_rss_mb", 120),
    )

    def run(self, say: Say) -> Finding:
        """Send the schedule, compare every row; return the finding."""
        with stack.running(make_fleet(self.devices, SEED)) as own:
            return uvloop.run(self.sent(own)).finding(self.name, self.title)

    async def sent(self, own: stack.Stack) -> Trial:
        """Send the schedule to a daemon with the fleet imported and compare every row."""
        fleet = make_fleet(self.devices, SEED)
        plan = schedule(self.devices, self.interval_s, self.jitter_s, self.duration_s, SEED)
        return await examine(own, fleet, await send(own, fleet, plan), self.limits)


STEADY_2000: Final = Steady()
STEADY_500: Final = Steady(
    "1-steady-500", "500 devices at 60 s", devices=500, jitter_s=0, limits=(*ALL_ACKNOWLEDGED, *FLOORS)
)
