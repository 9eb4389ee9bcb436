"""What a comparison measured, and the verdicts on it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

from bench.cost import PerHeartbeat
from bench.floors import Orientation
from bench.report import Limit, Percentiles, Verdict, hold

BARE: Final = "bare aiohttp handler"
NEXHB: Final = "nexhb"
FASTAPI: Final = "FastAPI + INSERT a request"
NEXMDM: Final = "NexMDM's path without bcrypt"
NEXMDM_THREADS: Final = "the same on threads"
NEXMDM_BCRYPT: Final = "NexMDM's path"
ARRAY: Final = "POST /v1/heartbeats, JSON array"
NDJSON: Final = "POST /v1/heartbeats, NDJSON"

_OF_BARE: Final = Limit("single heartbeats, of the bare handler's rate", "", 0.55, "at_least")
_TIMES: Final = {
    FASTAPI: Limit("times FastAPI + INSERT", "", 8, "at_least"),
    NEXMDM_BCRYPT: Limit("times NexMDM's path", "", 1000, "at_least"),
    NEXMDM: Limit("times NexMDM's path without bcrypt", "", 40, "at_least"),
}
_OF_COPY: Final = 0.4
_COMMITS: Final = 5
_MORE_MS: Final = 5.0
_REALLY_SENT: Final = Limit("share of the higher rate really sent", "", 0.95, "at_least")
_LOST: Final = Limit("rows that peers acknowledged and do not have", "", 0)


class Side(NamedTuple):
    """Both rates at a number of connections, heartbeats/s."""

    bare: float
    nexhb: float


class Rounds(NamedTuple):
    """One way in: heartbeats/s of each round, CPU of each heartbeat (medians), connections."""

    per_s: tuple[float, ...]
    cpu: PerHeartbeat | None = None
    connections: int | None = None
    p99_ms: float | None = None

    @property
    def median(self) -> float:
        """The rate that counts."""
        return median(self.per_s)


class Pace(NamedTuple):
    """A stretch of an open loop: what was due, what was sent, what a heartbeat cost and took."""

    due_per_s: float
    sent_per_s: float
    cpu: PerHeartbeat
    latency: Percentiles


@dataclass(frozen=True, slots=True)
class Found:
    """All of it. Floors and peers by name."""

    sides: Mapping[int, Side]
    singles: Mapping[str, Rounds]
    # FastAPI's tries: (pool, connections) → heartbeats/s
    pools: Mapping[tuple[int, int], float]
    pool: int
    # connections → heartbeats/s, tried with arrays
    batch_tries: Mapping[int, float]
    batches: Mapping[str, Rounds]
    # rows of a transaction → rows/s
    copies: Mapping[int, tuple[float, ...]]
    # rows/s of the larger transactions, of values that were packed beforehand
    packed_copy: tuple[float, ...]
    paces: tuple[Pace, Pace]
    steady: Percentiles
    least: Orientation
    # rows that peers acknowledged, and that they have
    acknowledged: int
    kept: int
    # CPU µs of the generator: a single heartbeat's send in a closed loop, one of a batch's
    generator_us: float
    generator_batch_us: float
    # cores busy with something else, of every run
    others_cores: tuple[float, ...]
    load_average: float

    @property
    def copy(self) -> float:
        """Rows/s of COPY, of the faster batch."""
        return max(median(each) for each in self.copies.values())

    def times(self, peer: str) -> float:
        """How many times a peer's rate nexhb's is."""
        return self.singles[NEXHB].median / self.singles[peer].median

    def of_copy(self, form: str) -> float:
        """The part of COPY's rows/s that a form of POST /v1/heartbeats reaches."""
        return self.batches[form].median / self.copy

    @property
    def p99_bound_ms(self) -> float:
        """Five commits and five milliseconds."""
        return round(_COMMITS * self.least.one_row_commit_ms + _MORE_MS, 3)


def verdicts(found: Found) -> tuple[Verdict, ...]:
    """Every floor of the comparison, kept or broken."""
    slow, fast = found.paces
    costs = zip(PerHeartbeat._fields, slow.cpu, fast.cpu, strict=True)
    grows = [(whose.partition("_")[0], round(after / max(before, 0.1), 3)) for whose, before, after in costs]
    return (
        hold(_OF_BARE, round(found.times(BARE), 3)),
        *(hold(limit, round(found.times(peer), 1)) for peer, limit in _TIMES.items()),
        *(
            hold(Limit(f"{form}: of raw COPY's rows/s", "", _OF_COPY, "at_least"), round(found.of_copy(form), 3))
            for form in (ARRAY, NDJSON)
        ),
        hold(
            Limit("p99 at 2,000 devices, ms: five one-row commits and 5 ms", "", found.p99_bound_ms),
            found.steady.p99_ms,
        ),
        *(
            hold(Limit(f"{whose}'s CPU a heartbeat at the higher rate, of that at the lower", "", 1), growth)
            for whose, growth in grows
        ),
        hold(_REALLY_SENT, round(fast.sent_per_s / fast.due_per_s, 3)),
        hold(_LOST, found.acknowledged - found.kept),
    )


def busy(cores: Sequence[float]) -> str:
    """How quiet the machine was, for a person."""
    if not cores:
        return "not known"
    return f"{median(cores):.2f} cores (median), {max(cores):.2f} (at most) were busy with something else"
