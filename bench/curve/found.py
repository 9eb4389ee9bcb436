"""What the curve's points measured, and the verdicts on them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bench.cost import PerHeartbeat
from bench.curve.wanted import Signals, daemons_wanted
from bench.report import Limit, Percentiles, Verdict, hold
from bench.scenarios import FLOORS

_SENT: Final = 0.95
# of the point before: a tenth is what two runs differ by
_GROWS: Final = 1.1
_KNOWN_BYTES: Final = 1_000
_ROW_BYTES: Final = 130
# a batch wants to be worth its pages before bytes a row say anything
_ROWS_LEAST: Final = 50_000


@dataclass(frozen=True, slots=True)
class Memory:
    """The daemon's resident memory, MB (10^6 bytes)."""

    # started anew, every token known and no heartbeat heard
    known_mb: float
    # after the first heartbeat of each that was heard
    heard_mb: float
    end_mb: float


@dataclass(frozen=True, slots=True)
class Point:
    """A rate, its fleet, and what came of it."""

    name: str
    devices: int
    heard: int
    # None: as fast as it goes
    due_per_s: float | None
    sent_per_s: float
    latency: Percentiles
    cpu: PerHeartbeat
    # of the daemon, and of the generator, in cores
    daemon_cores: float
    generator_cores: float
    memory: Memory
    # until it was ready, every token read
    start_s: float
    row_bytes: float
    rows: int
    wal_bytes: float
    status_bytes: float
    batch_mean: float | None
    batch_max: int
    # 99th percentiles; None where the daemon does not say
    queue_wait_ms: float | None
    loop_lag_ms: float | None
    # of the first heartbeats of all, as fast as they went
    first_per_s: float | None
    others_cores: float

    @property
    def signals(self) -> Signals:
        """As the formula wants them."""
        wait, lag = ((None if ms is None else ms / 1e3) for ms in (self.queue_wait_ms, self.loop_lag_ms))
        filled = None if self.batch_mean is None else self.batch_mean / self.batch_max
        return Signals(1, self.daemon_cores, wait, lag, filled)

    @property
    def wanted(self) -> int:
        """Daemons."""
        return daemons_wanted(self.signals)


@dataclass(frozen=True, slots=True)
class Curve:
    """Rates from the lowest to the highest, and the ceiling."""

    paces: tuple[Point, ...]
    ceiling: Point
    # what `bench idle` said, where it ran: name → text
    idle: dict[str, str]

    @property
    def points(self) -> tuple[Point, ...]:
        """All of them."""
        return (*self.paces, self.ceiling)

    @property
    def known_bytes(self) -> float:
        """Memory of the daemon for each device that it knows, between the smallest fleet and the largest."""
        small, large = self.paces[0], self.paces[-1]
        return round((large.memory.known_mb - small.memory.known_mb) * 1e6 / max(1, large.devices - small.devices))

    @property
    def heard_bytes(self) -> float:
        """And for each that was heard besides, in the largest fleet."""
        large = self.paces[-1]
        return round((large.memory.end_mb - large.memory.known_mb) * 1e6 / max(1, large.heard))


def verdicts(curve: Curve) -> tuple[Verdict, ...]:
    """Every floor of the curve, kept or broken."""
    held: list[Verdict] = []
    for point in curve.paces:
        name = f"{point.devices:,} devices"
        sent = point.sent_per_s / (point.due_per_s or point.sent_per_s)
        held.append(hold(Limit(f"{name}: share of the rate really sent", "", _SENT, "at_least"), round(sent, 3)))
        held += [
            hold(Limit(f"{name}: {limit.name}", "", limit.limit), getattr(point.latency, limit.field))
            for limit in FLOORS
        ]
    held += _growth(curve.paces)
    largest = curve.paces[-1]
    held.append(hold(Limit("memory of the daemon for a known device, bytes", "", _KNOWN_BYTES), curve.known_bytes))
    if largest.rows >= _ROWS_LEAST:
        name = f"{largest.devices:,} devices: bytes of the history for a heartbeat"
        held.append(hold(Limit(name, "", _ROW_BYTES), largest.row_bytes))
    return tuple(held)


def _growth(paces: Sequence[Point]) -> list[Verdict]:
    """CPU of a heartbeat falls as the rate rises, for more of them share a transaction."""
    return [
        hold(
            Limit(f"CPU of a heartbeat at {after.devices:,} devices, of that at {before.devices:,}", "", _GROWS),
            round(sum(after.cpu) / max(0.1, sum(before.cpu)), 3),
        )
        for before, after in pairwise(paces)
    ]
