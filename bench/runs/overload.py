"""Twice what the machine takes: what is accepted, what the others hear, and how soon all is well again."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Final

import uvloop

from bench import stack
from bench.cost import Sample, forget_peak, growth_of, memory_of, watched
from bench.finding import Finding
from bench.fleet import MICROS, Device, make_fleet
from bench.load import RATE_BOUND, Flooded, LoadRun, Record, Span, Stage, closed_loop, flood, recent_span, target
from bench.report import Result, percentiles
from bench.scenarios import OverloadScenario
from bench.trial import Trial, examine

_SEED: Final = 1
_CAPACITY_CONNECTIONS: Final = 256
# what one of the bench's devices sends is what thousands would: none of them is too busy
_MANY: Final = "1000000"
_EVERY_S: Final = 0.5
# full service is so many seconds of it in a row
_CALM_SECONDS: Final = 3


@dataclass(slots=True)
class Second:
    """What was due within one second of the run."""

    held_back: int = 0
    # by HTTP status; 0 is no answer
    statuses: Counter[int] = field(default_factory=Counter)
    accepted_s: array[float] = field(default_factory=lambda: array("f"))
    refused_s: array[float] = field(default_factory=lambda: array("f"))
    # next_heartbeat_seconds of each accepted one, Retry-After of each refused one
    next_s: array[int] = field(default_factory=lambda: array("h"))
    retry_after_s: Counter[int] = field(default_factory=Counter)

    @property
    def sent(self) -> int:
        """Requests that went out."""
        return self.statuses.total()

    def is_calm(self, p99_ms: float) -> bool:
        """Whether everything that was due was sent, accepted, and at once."""
        if self.held_back or not self.sent or self.statuses.keys() != {200}:
            return False
        return (percentiles(self.accepted_s).p99_ms or 0.0) < p99_ms


def by_second(record: Record, seconds: int) -> list[Second]:
    """The record, by the second in which a send was due; what was due later is in the last."""
    found = [Second() for _ in range(seconds)]
    for due_us, took_s, status, told_s in zip(record.due_us, record.took_s, record.status, record.told_s, strict=True):
        second = found[min(due_us // MICROS, seconds - 1)]
        second.statuses[status] += 1
        if status == 200:
            second.accepted_s.append(took_s)
            second.next_s.append(told_s)
        elif status:
            second.refused_s.append(took_s)
            second.retry_after_s[told_s] += 1
    for due_us in record.held_back_us:
        found[min(due_us // MICROS, seconds - 1)].held_back += 1
    return found


def recovered_s(after: Sequence[Second], p99_ms: float) -> int | None:
    """After how many seconds full service began: the first of several calm ones. None: it never did."""
    for at in range(len(after) - _CALM_SECONDS + 1):
        if all(second.is_calm(p99_ms) for second in after[at : at + _CALM_SECONDS]):
            return at
    return None


def run(scenario: OverloadScenario) -> Finding:
    """Find the rate, send twice as much, compare every row."""
    fleet = make_fleet(scenario.devices, _SEED)
    settings = {
        "NEXHB_INGEST__DEVICE_PER_MINUTE": _MANY,
        "NEXHB_INGEST__DEVICE_BURST": _MANY,
        "NEXHB_INGEST__QUEUE_ITEMS": str(scenario.queue_items),
    }
    with stack.running(fleet, settings=settings) as own:
        return uvloop.run(_run(scenario, own, fleet))


async def _run(scenario: OverloadScenario, own: stack.Stack, fleet: Sequence[Device]) -> Finding:
    first, second = spans(scenario, len(fleet))
    to = target(own.url)
    capacity = await closed_loop(
        to,
        fleet,
        connections=_CAPACITY_CONNECTIONS,
        duration_s=scenario.capacity_s,
        warm_s=scenario.capacity_s / 3,
        span=first,
        pid=own.pid,
    )
    takes = capacity.result.rate_per_s
    stages = (
        Stage("before", scenario.normal * takes, scenario.before_s),
        Stage("overload", scenario.times * takes, scenario.overload_s),
        Stage("after", scenario.normal * takes, scenario.after_s),
    )
    at_start: list[Sample] = []
    async with watched(own.pid, _EVERY_S) as samples:

        def begin() -> None:
            # what so many connections take is there before the first heartbeat
            at_start.append(Sample(samples[-1].at_s, memory_of(own.pid).rss_mb))
            samples.clear()
            forget_peak(own.pid)

        flooded = await flood(
            to,
            fleet,
            stages,
            second,
            connections=scenario.connections,
            pid=own.pid,
            seed=_SEED,
            started=begin,
        )
    told = _Told(scenario, takes, flooded, (at_start[0], *samples), memory_of(own.pid).peak_mb)
    record = capacity.sends
    record.extend(flooded.run.sends)
    judged = LoadRun(replace(flooded.run.result, extra={**flooded.run.result.extra, **told.extra()}), record)
    trial = await examine(own, fleet, judged, scenario.limits)
    return told.finding(trial, capacity.result)


def spans(scenario: OverloadScenario, devices: int) -> tuple[Span, Span]:
    """Buckets for the search for the rate, and later ones for the flood: as many as the fastest machine could want."""
    search = round(RATE_BOUND * scenario.capacity_s)
    easy_s = scenario.normal * (scenario.before_s + scenario.after_s)
    rest = round(RATE_BOUND * (scenario.times * scenario.overload_s + easy_s))
    whole = recent_span(search + rest + 2 * devices, devices, time.time_ns() // 1000)
    first = whole.first_us + (search // devices + 1) * (whole.end_us - whole.first_us) // whole.buckets
    head = search // devices + 1
    return Span(whole.first_us, head), Span(first, whole.buckets - head)


class _Told:
    """What the run says of it."""

    def __init__(
        self, scenario: OverloadScenario, takes: float, flooded: Flooded, samples: Sequence[Sample], peak_mb: float
    ) -> None:
        self.scenario, self.takes, self.flooded, self.peak_mb = scenario, takes, flooded, peak_mb
        self.samples = tuple(samples)
        start, end = round(scenario.before_s), round(scenario.before_s + scenario.overload_s)
        seconds = by_second(flooded.record, end + round(scenario.after_s))
        self.before, self.during, self.after = seconds[:start], seconds[start:end], seconds[end:]
        self.recovered_s = recovered_s(self.after, scenario.calm_ms)
        self.accepted = percentiles(_joined(second.accepted_s for second in self.during))
        self.refused = percentiles(_joined(second.refused_s for second in self.during))
        self.retry_after = sum((second.retry_after_s for second in seconds), Counter[int]())
        self.statuses = sum((second.statuses for second in self.during), Counter[int]())

    @property
    def during_samples(self) -> list[Sample]:
        """Memory while it lasted."""
        start_s = self.scenario.before_s
        return [each for each in self.samples if start_s <= each.at_s - self.samples[0].at_s < start_s + self._for_s]

    @property
    def _for_s(self) -> float:
        return self.scenario.overload_s

    def extra(self) -> dict[str, float | int | None]:
        """What limits are held against."""
        during = self.during_samples
        answers = self.flooded.run.result.statuses
        return {
            "capacity_per_s": self.takes,
            "other_answers": sum(number for status, number in answers.items() if status not in ("200", "503")),
            "accepted_p99_ms": self.accepted.p99_ms,
            "refused_p99_ms": self.refused.p99_ms,
            "goodput": round(self.statuses[200] / self._for_s / self.takes, 3),
            "retry_after_values": len(self.retry_after),
            "next_most_s": max((max(second.next_s, default=0) for second in self.during), default=0),
            "next_after_s": max((max(second.next_s, default=0) for second in self.after[-5:]), default=0),
            "recovered_s": self.recovered_s,
            "growth_mb": round(self.peak_mb - self.samples[0].rss_mb, 1),
            "second_half_mb": growth_of(during[len(during) // 2 :]),
        }

    def finding(self, trial: Trial, capacity: Result) -> Finding:
        """For a person, and for a file."""
        scenario = self.scenario
        sent, held = sum(each.sent for each in self.during), sum(each.held_back for each in self.during)
        cost = self.flooded.costs[1]
        server_s, tree_s = cost.server_s or 0.0, cost.server_tree_s or 0.0
        cores = f"generator {cost.generator_s / cost.at_s:.2f} cores, daemon {server_s / cost.at_s:.2f}, "
        cores += f"PostgreSQL {(tree_s - server_s) / cost.at_s:.2f}, others {cost.others_cores}"
        most, least = max(self.retry_after, default=0), min(self.retry_after, default=0)
        share = max(self.retry_after.values(), default=0) / max(1, self.retry_after.total())
        figures = {
            "capacity": f"{self.takes:,.0f}/s, closed loop, {_CAPACITY_CONNECTIONS} connections; "
            f"others {capacity.extra.get('others_cores')} cores",
            "due": f"{(sent + held) / self._for_s:,.0f}/s, "
            f"{(sent + held) / self._for_s / self.takes:.2f} times as much",
            "really sent": f"{sent / self._for_s:,.0f}/s; for the rest all {scenario.connections:,} connections waited "
            f"for an answer; generator late by {self.flooded.run.result.late_sends_p99_ms} ms at p99",
            "accepted": f"{self.statuses[200] / self._for_s:,.0f}/s, p50 {_s(self.accepted.p50_ms)}, "
            f"p99 {_s(self.accepted.p99_ms)}, max {_s(self.accepted.max_ms)}",
            "refused": f"{self.statuses[503] / self._for_s:,.0f}/s with 503, p50 {_s(self.refused.p50_ms)}, "
            f"p99 {_s(self.refused.p99_ms)}, max {_s(self.refused.max_ms)}",
            "Retry-After": f"{least} to {most} s, {len(self.retry_after)} values, none more often than {share:.1%}",
            "next_heartbeat_seconds": f"{_told(self.before)} before, {_told(self.during)} during, "
            f"{_told(self.after[(self.recovered_s or 0) :])} after",
            "full service": "never"
            if self.recovered_s is None
            else f"{self.recovered_s} s after the end: all 200, p99 < {scenario.calm_ms:g} ms",
            "memory": f"{self.samples[0].rss_mb:g} MB with all connections open, {self.peak_mb:g} MB at most",
            "cores": cores,
            "rows": f"{trial.check.lines[0].found:,} found, {trial.check.lines[0].expected:,} acknowledged",
        }
        seconds = [
            {
                "sent": each.sent,
                "held_back": each.held_back,
                "statuses": {str(status): number for status, number in each.statuses.items()},
                "p99_ms": percentiles(each.accepted_s).p99_ms,
                "next_most_s": max(each.next_s, default=None),
            }
            for each in (*self.before, *self.during, *self.after)
        ]
        details = {**trial.to_json(), "seconds": seconds, "samples": [each._asdict() for each in self.samples]}
        return Finding(scenario.name, scenario.title, trial.result.verdicts, figures, details)


def _joined(parts: Iterable[array[float]]) -> array[float]:
    found = array("f")
    for part in parts:
        found.extend(part)
    return found


def _s(value_ms: float | None) -> str:
    return "-" if value_ms is None else f"{value_ms / 1e3:.2f} s"


def _told(seconds: Sequence[Second]) -> str:
    """The range and the mean of what accepted devices were told."""
    values = [value for second in seconds for value in second.next_s]
    if not values:
        return "nothing"
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most} (mean {mean(values):.0f})"
