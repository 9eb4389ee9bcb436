"""Send twice what the machine accepts: which requests are accepted and refused, and when full service returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import uvloop

from bench import stack
from bench.cost import forget_peak
from bench.finding import Finding, spread
from bench.fleet import make_fleet
from bench.load import RATE_BOUND, Keys, LoadRun, Spliced, due_times, stream, target
from bench.report import Limit, Outcome, SendLog, percentiles
from bench.runs import Plan, Say
from bench.trial import SEED, UNLIMITED, combined, examine

_CAPACITY_CONNECTIONS: Final = 256
_CALM_SECONDS: Final = 3


def recovered_s(sends: SendLog, end_s: float, last_s: float, calm_ms: float) -> float | None:
    """Return the seconds from the overload's end until full service, which begins with the first of three consecutive
    seconds in which everything was acknowledged, with a p99 below `calm_ms`; None if it never begins."""
    calm = 0
    for second in range(int(last_s - end_s)):
        part = sends.due_in(end_s + second, end_s + second + 1)
        p99_ms = percentiles(part.latencies()).p99_ms
        acknowledged = part.acknowledged == len(part)
        calm = calm + 1 if acknowledged and p99_ms is not None and p99_ms < calm_ms else 0
        if calm == _CALM_SECONDS:
            return second + 1 - _CALM_SECONDS
    return None


@dataclass(frozen=True)
class Overload(Plan):
    """A rate that the machine cannot accept, between two periods of a low rate."""

    QUICK: ClassVar = {"before_s": 5.0, "overload_s": 15.0, "after_s": 15.0}

    name: str = "overload"
    title: str = "twice what the machine accepts for two minutes, and what comes after"
    devices: int = 2000
    # A connection has one request at a time. Filling the default queue of 10,000 would take more than 10,000
    # connections, and as many file descriptors of the daemon and of the generator; with fewer, nothing would ever be
    # refused.
    connections: int = 8000
    queue_items: int = 5000
    # duration of the closed loop that measures the capacity
    capacity_s: float = 6
    # rates, as shares of the capacity
    normal: float = 0.1
    times: float = 2
    before_s: float = 10
    overload_s: float = 120
    after_s: float = 30
    limits: tuple[Limit, ...] = (
        Limit("sends without a response", "failed", 0),
        Limit("responses other than 200 and 503", "other_responses", 0),
        Limit("refused, at least", "refused", 1, "at_least"),
        Limit("the generator's own lateness, p99 below 250 ms", "late_sends_p99_ms", 250),
        # A coarse limit, which holds on any machine: ingest.answer_within_seconds. On two idle cores a full queue is
        # written in 0.6 s.
        Limit("p99 of what is accepted, below 10 s", "accepted_p99_ms", 10_000),
        Limit("p99 of what is refused, below 10 s", "refused_p99_ms", 10_000),
        Limit("accepted during the overload: share of the capacity", "goodput", 0.4, "at_least"),
        Limit("seconds until full service", "recovered_s", 5),
        Limit("growth of the daemon's memory, below 150 MB", "growth_mb", 150),
    )

    def run(self, say: Say) -> Finding:
        """Measure the capacity, send twice as much, compare every row; return the finding."""
        settings = UNLIMITED | {"NEXHB_INGEST__QUEUE_ITEMS": str(self.queue_items)}
        with stack.running(make_fleet(self.devices, SEED), settings=settings) as own:
            return uvloop.run(self._run(own))

    async def _run(self, own: stack.Stack) -> Finding:
        fleet, to = make_fleet(self.devices, SEED), target(own.url)
        lasts_s = self.times * self.overload_s + self.normal * (self.before_s + self.after_s)
        first, rest = round(RATE_BOUND * self.capacity_s), round(RATE_BOUND * lasts_s)
        keys = Keys(first + rest + 2 * len(fleet), len(fleet))
        requests = Spliced(to, fleet, keys.holding(first))
        closed = await stream(to, requests, connections=_CAPACITY_CONNECTIONS, duration_s=self.capacity_s, warm_s=2)
        capacity = closed.result.rate_per_s
        easy, hard = self.normal * capacity, self.times * capacity
        stages = ((easy, self.before_s), (hard, self.overload_s), (easy, self.after_s))
        before_mb: list[float] = []

        def started() -> None:
            # the memory of the connections is in use before the first heartbeat
            before_mb.append(own.memory().rss_mb)
            forget_peak(own.pid)

        requests, lasts_s = Spliced(to, fleet, keys.holding(rest)), sum(seconds for _, seconds in stages)
        options: dict[str, Any] = {"connections": self.connections, "hold_back": True, "pids": (own.pid,)}
        flood = await stream(to, requests, due_times(*stages), duration_s=lasts_s, started=started, **options)
        extra, figures = self._judged(capacity, flood)
        growth_mb = round(own.memory().peak_mb - before_mb[0], 1)
        figures["memory"] = f"{before_mb[0]:g} MB with all connections open, {growth_mb:+g} MB at most"
        result = flood.result.with_extra(**extra, growth_mb=growth_mb)
        run = replace(flood, result=result, sends=combined([closed, flood]).sends)
        trial = await examine(own, fleet, run, self.limits)
        return trial.finding(self.name, self.title, figures=figures)

    def _judged(self, capacity: float, flood: LoadRun) -> tuple[dict[str, float | None], dict[str, str]]:
        """Return the values to which the limits apply, and the figures to read."""
        end_s = self.before_s + self.overload_s
        during = flood.sends.due_in(self.before_s, end_s)
        accepted, refused = percentiles(during.latencies()), percentiles(during.latencies(Outcome.REFUSED))
        accepted_per_s = during.acknowledged / self.overload_s
        recovered = recovered_s(flood.sends, end_s, end_s + self.after_s, calm_ms=150)
        extra: dict[str, float | None] = {
            "accepted_p99_ms": accepted.p99_ms,
            "refused_p99_ms": refused.p99_ms,
            "goodput": round(accepted_per_s / capacity, 3),
            "recovered_s": recovered,
        }
        figures = {
            "capacity": f"{capacity:,.0f}/s, over {_CAPACITY_CONNECTIONS} connections; {self.times:g} times that due",
            "really sent": f"{len(during) / self.overload_s:,.0f}/s; for the rest all {self.connections:,} connections "
            "waited for a response",
            "accepted": f"{accepted_per_s:,.0f}/s, {spread(accepted)}",
            "refused": f"{during.count(Outcome.REFUSED) / self.overload_s:,.0f}/s, {spread(refused)}",
            "full service": f"{recovered} s after the end",
        }
        return extra, figures
