"""The record of a run, its result, and the limits that the result must keep."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Final, Literal

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]  # the package carries no types

# The longest latency that a histogram holds. A request times out after 30 s; ten minutes are enough for a heartbeat
# that was sent more than once.
_HIGHEST_US: Final = 600_000_000


class Outcome(IntEnum):
    """The outcome of one send; a value below REFUSED means acknowledged or pending."""

    PENDING = 0
    WRITTEN = 1
    DEDUPLICATED = 2
    REFUSED = 3
    FAILED = 4


ACKED: Final = (Outcome.WRITTEN, Outcome.DEDUPLICATED)


@dataclass(slots=True)
class SendLog:
    """Every send of a run, in 29 bytes each, for the comparison with the database."""

    device: array[int] = field(default_factory=lambda: array("i"))
    ts_us: array[int] = field(default_factory=lambda: array("q"))
    # when the send was due, or in a closed loop when it was made: µs from the start of the run
    due_us: array[int] = field(default_factory=lambda: array("q"))
    outcome: array[int] = field(default_factory=lambda: array("b"))
    # seconds from the due time to the response, also to a refusal; NaN without a response
    latency_s: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        """Return how many sends there are."""
        return len(self.device)

    def add(self, device: int, ts_us: int, due_us: int = 0) -> int:
        """Record a send that starts now; return its number."""
        self.device.append(device)
        self.ts_us.append(ts_us)
        self.due_us.append(due_us)
        self.outcome.append(Outcome.PENDING)
        self.latency_s.append(math.nan)
        return len(self.device) - 1

    def extend(self, other: SendLog) -> None:
        """Append another log's sends."""
        for each in fields(self):
            getattr(self, each.name).extend(getattr(other, each.name))

    def due_in(self, start_s: float, end_s: float) -> SendLog:
        """Return the sends of an open loop that were due in a period of the run."""
        first, last = (bisect_left(self.due_us, at_s * 1e6) for at_s in (start_s, end_s))
        return SendLog(*(getattr(self, each.name)[first:last] for each in fields(self)))

    def count(self, *outcomes: Outcome) -> int:
        """Return how many sends had one of these outcomes."""
        return sum(self.outcome.count(outcome) for outcome in outcomes)

    @property
    def acknowledged(self) -> int:
        """Return how many sends got a 2xx."""
        return self.count(*ACKED)

    def latencies(self, *outcomes: Outcome) -> list[float]:
        """Return the latencies in seconds of the sends with one of these outcomes, by default of those with a 2xx."""
        kept, pairs = frozenset(outcomes or ACKED), zip(self.outcome, self.latency_s, strict=True)
        return [latency for outcome, latency in pairs if outcome in kept]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies in milliseconds; None if nothing was acknowledged."""

    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


def percentiles(latencies_s: Sequence[float]) -> Percentiles:
    """Return percentiles by an HDR histogram of three significant figures; the maximum is exact."""
    if not latencies_s:
        return Percentiles()
    histogram = HdrHistogram(1, _HIGHEST_US, 3)
    for latency in latencies_s:
        histogram.record_value(min(_HIGHEST_US, max(1, int(latency * 1e6))))
    p50, p95, p99 = (histogram.get_value_at_percentile(p) / 1e3 for p in (50, 95, 99))
    return Percentiles(p50, p95, p99, round(max(latencies_s) * 1e3, 3))


Kind = Literal["at_most", "at_least"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of a result: `field` (of the result or its extra) must be at most, or at least, `limit`."""

    name: str
    field: str
    limit: float
    kind: Kind = "at_most"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit, and whether it was kept; a value of None (nothing was measured) breaks it."""

    name: str
    limit: float
    value: float | None
    ok: bool
    kind: Kind = "at_most"


def at_most(name: str, limit: float, value: float | None) -> Verdict:
    """Judge a value that must not exceed a limit."""
    return Verdict(name, limit, value, ok=value is not None and value <= limit)


def at_least(name: str, limit: float, value: float | None) -> Verdict:
    """Judge a value that must not fall below a limit."""
    return Verdict(name, limit, value, ok=value is not None and value >= limit, kind="at_least")


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run. `sent` = `ok` + `refused` + `failed` count requests: each retry of a heartbeat counts."""

    mode: str
    devices: int
    duration_s: float
    sent: int
    ok: int
    refused: int
    failed: int
    deduplicated: int
    # latencies of the acknowledged requests, from the intended send time
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    rate_per_s: float
    # responses by HTTP status, and failures by reason
    statuses: Mapping[str, int]
    failures: Mapping[str, int]
    # delay of the generator itself: from the intended time to the write (or to the wait for a connection)
    late_sends_p99_ms: float | None
    connections_opened: int
    # CPU per request; None if the server's process is unknown
    generator_us: float | None
    daemon_us: float | None
    postgres_us: float | None
    daemon_cores: float | None
    others_cores: float | None
    # figures that only some kinds of load have
    extra: Mapping[str, float | int | None] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @property
    def other_responses(self) -> int:
        """Return how many responses were neither 200 nor 503."""
        return sum(number for status, number in self.statuses.items() if status not in ("200", "503"))

    @property
    def latency(self) -> Percentiles:
        """Return the result's percentiles."""
        return Percentiles(self.p50_ms, self.p95_ms, self.p99_ms, self.max_ms)

    def with_extra(self, **extra: float | None) -> Result:
        """Return the result with more figures."""
        return replace(self, extra={**self.extra, **extra})


def counts_of(results: Sequence[Result], times: int = 1) -> dict[str, Any]:
    """Return the sums of the counts of requests, each multiplied by `times`."""
    names = ("sent", "ok", "refused", "failed", "deduplicated")
    return {name: times * sum(getattr(each, name) for each in results) for name in names}


ALL_ACKNOWLEDGED: Final = (
    Limit("nothing refused", "refused", 0),
    Limit("nothing failed", "failed", 0),
    Limit("heartbeats acknowledged", "ok", 1, "at_least"),
)
NOTHING_DEDUPLICATED: Final = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
# a service that breaks these limits counts as broken, whatever its other figures are
FLOORS: Final = (Limit("p95 below 150 ms", "p95_ms", 150), Limit("p99 below 300 ms", "p99_ms", 300))


def judge(result: Result, limits: Iterable[Limit]) -> Result:
    """Return the result with one more verdict per limit."""
    verdicts = []
    for limit in limits:
        value = result.extra[limit.field] if limit.field in result.extra else getattr(result, limit.field)
        verdicts.append((at_most if limit.kind == "at_most" else at_least)(limit.name, limit.limit, value))
    return replace(result, verdicts=(*result.verdicts, *verdicts))
