"""Classify the time of one device's day: closed, ours, heard, replayed, off or unknown. Pure.

Times are seconds since the epoch. What a device states is in its own time (ts); everything else is in the database's
time, and is shifted by the device's skew (its usual received_at - ts) before both are compared. A day is
divided into 14,400 tenths of a minute, so that all parts are integers whose sum is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple

DAY_S = 86_400
UNIT_S = 6  # a tenth of a minute
UNITS_PER_DAY = DAY_S // UNIT_S
INTERVALS_HEARD = 1.5  # the device was heard between two heartbeats that are at most this many intervals apart
INTERVALS_OFFLINE = 2.5

HEARD, REPLAYED, OFF, UNKNOWN = "heard", "replayed", "off", "unknown"


class Range(NamedTuple):
    """The time start ≤ t < end."""

    start: float
    end: float


class Beat(NamedTuple):
    """One heartbeat."""

    at: float
    received: float
    uptime_s: int | None


class Stretch(NamedTuple):
    """Heartbeats of one boot that follow each other regularly, arrive in their order, are all late or all in time, and
    report the same state of Unity. A heartbeat is late if it was received later than usual by more than the offline
    threshold."""

    start: float
    end: float
    first_received: float
    last_received: float
    late: bool
    uptime_s: int | None  # in the first heartbeat
    unity: bool | None


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """What the heartbeats of one device show about a day: those of the day, of the minutes before it, and the next."""

    interval_s: float
    skew_s: float
    stretches: Sequence[Stretch] = ()
    previous_at: float | None = None  # the heartbeat before the first stretch; -inf: some time ago; None: there is none
    following: Beat | None = None  # the first heartbeat after the day and after the last stretch; None: not (yet) known
    battery_least: int | None = None


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What nexhb knows about a day apart from heartbeats. The ranges are in the database's time, sorted, and do not
    overlap. They cover the day, the next day, in which a silence that begins in the day may end, and the skew."""

    start: float  # of the UTC day
    now: float
    offline_after_s: float
    open: Sequence[Range]  # the site's opening hours; one range if it is always open
    blackouts: Sequence[Range]
    created: float = -inf
    revoked: float = inf


class DayParts(NamedTuple):
    """The parts of a device's day, in tenths of a minute. The first six add up to the time between the device's
    creation and its revocation."""

    closed: int
    ours: int
    heard: int
    replayed: int
    off: int
    unknown: int
    unity: int  # Unity was running, according to heartbeats in heard and replayed time
    battery_least: int | None
    flaps: int
    reboots: int
    is_open: bool  # part of `unknown` is a silence that had not ended when the parts were computed


class _Piece(NamedTuple):
    start: float
    end: float
    kind: str
    unity: bool


def day_parts(heartbeats: Heartbeats, day: Circumstances) -> DayParts | None:
    """Return the parts of the day, or None if the device did not exist then (created later, or revoked before)."""
    shifted = _in_device_time(day, heartbeats.skew_s)
    life = _life(heartbeats, shifted)
    if life.start >= life.end:
        return None
    evidence = _Evidence(heartbeats, shifted)
    for stretch in heartbeats.stretches:
        evidence.add_stretch(stretch)
    evidence.add_end()
    return _parts(evidence, life)


def share(heard: int, replayed: int, whole: int, closed: int, ours: int) -> float | None:
    """Return the uptime as a share of the time in which the device should have been up; None if there was none."""
    due = whole - closed - ours
    return None if due <= 0 else (heard + replayed) / due


def _in_device_time(day: Circumstances, skew_s: float) -> Circumstances:
    """Return the circumstances by the device's clock. The day itself is the day of that clock, as in the history."""
    return replace(
        day,
        now=day.now - skew_s,
        open=[Range(start - skew_s, end - skew_s) for start, end in day.open],
        blackouts=[Range(start - skew_s, end - skew_s) for start, end in day.blackouts],
        created=day.created - skew_s,
        revoked=day.revoked - skew_s,
    )


def _life(heartbeats: Heartbeats, day: Circumstances) -> Range:
    """Return the part of the day in which the device existed. An imported device has heartbeats from before its
    creation; it existed from the first of them on. The present day ends now."""
    first = heartbeats.stretches[0].start if heartbeats.stretches else inf
    return Range(max(day.start, min(day.created, first)), min(day.start + DAY_S, day.revoked, day.now))


# ---- what the heartbeats show ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Evidence:
    """Pieces of time, in order and without overlaps, and what else the heartbeats show. All by the device's clock."""

    heartbeats: Heartbeats
    day: Circumstances
    pieces: list[_Piece] = field(default_factory=list)
    boots: list[float] = field(default_factory=list)
    open_since: float = inf  # the start of a silence that has not ended yet
    _last_at: float | None = None
    _unity: bool = False  # whether Unity was running, in the last heartbeat
    _line_back: float = -inf  # when the last replay began to arrive: what was made before was replayed

    def __post_init__(self) -> None:
        self._last_at = self.heartbeats.previous_at

    def add_stretch(self, stretch: Stretch) -> None:
        """Add the silence before the stretch, and the stretch."""
        arrivals = (stretch.first_received - self.heartbeats.skew_s, stretch.last_received - self.heartbeats.skew_s)
        received = min((one for one in arrivals if one > stretch.end), default=inf)
        if stretch.late and stretch.end >= self._line_back:  # a new replay, after which the line was back
            self._line_back = received
        elif stretch.start < self._line_back:  # the same replay, or live heartbeats that overtake it
            self._line_back = min(self._line_back, *arrivals)
        self._add_silence(stretch.start, stretch.uptime_s, stretch.late)
        self._unity = bool(stretch.unity)
        self._add_alive(stretch.start, stretch.end, stretch.late, self._unity)
        self._last_at = stretch.end

    def add_end(self) -> None:
        """Add the time after the last heartbeat of the day."""
        following, now = self.heartbeats.following, self.day.now
        if following is not None:
            received = following.received - self.heartbeats.skew_s
            self._line_back = min(self._line_back, received)
            self._add_silence(following.at, following.uptime_s, received - following.at > self.day.offline_after_s)
        elif self._last_at is not None and self._is_regular(self._last_at, now):
            self._add_alive(self._last_at, now, False, self._unity)
        else:
            self.open_since = -inf if self._last_at is None else self._last_at
            self._add(self.open_since, now, UNKNOWN)

    def _add_silence(self, at: float, uptime_s: int | None, late: bool) -> None:
        """Add the time between two consecutive heartbeats: the last one, and the one at `at`."""
        last_at, boot = self._last_at, None if uptime_s is None else at - uptime_s
        if last_at is None:  # nothing is known of a device before its first heartbeat
            self._add(-inf, at, UNKNOWN)
            return
        if boot is not None and boot > last_at:
            self.boots.append(boot)
        if self._is_regular(last_at, at):
            self._add_alive(last_at, at, late, self._unity)
        elif boot is None:
            self._add(last_at, at, UNKNOWN)
        elif boot <= last_at:  # it ran on through the silence
            self._add(last_at, at, REPLAYED)
        else:
            self._add(last_at, boot, OFF)
            self._add_alive(boot, at, late or at - boot > INTERVALS_HEARD * self.heartbeats.interval_s)

    def _is_regular(self, start: float, end: float) -> bool:
        """Return whether two heartbeats follow each other as usual. A blackout between them shows nothing."""
        longest = INTERVALS_HEARD * self.heartbeats.interval_s
        return end - start <= longest or (
            start > -inf and end - start - overlap(self.day.blackouts, start, end) <= longest
        )

    def _add_alive(self, start: float, end: float, replayed: bool, unity: bool = False) -> None:
        """Add time in which the device was running: as replayed if `replayed`; otherwise as replayed up to the
        moment when the line was back, and as heard after it."""
        until = end if replayed else min(max(self._line_back, start), end)
        self._add(start, until, REPLAYED, unity)
        self._add(until, end, HEARD, unity)

    def _add(self, start: float, end: float, kind: str, unity: bool = False) -> None:
        if start < end:
            self.pieces.append(_Piece(start, end, kind, unity))


# ---- the parts ------------------------------------------------------------------------------------------------------


def _parts(evidence: _Evidence, life: Range) -> DayParts:
    day = evidence.day

    def units(ranges: Iterable[Range]) -> list[tuple[int, int]]:
        return [(_unit(start - day.start), _unit(end - day.start)) for start, end in ranges]

    whole = _length(units([life]))
    open_units = _length(units(within(day.open, life)))
    due_units = units(within(without(day.open, day.blackouts), life))
    due = _length(due_units)
    sums, unity = {HEARD: 0, REPLAYED: 0, OFF: 0, UNKNOWN: 0}, 0
    for piece in evidence.pieces:
        if piece.end > life.start and piece.start < life.end:
            [(start, end)] = units([Range(piece.start, piece.end)])
            length = sum(max(min(end, b) - max(start, a), 0) for a, b in due_units)
            sums[piece.kind] += length
            unity += length if piece.unity else 0
    return DayParts(
        closed=whole - open_units,
        ours=open_units - due,
        heard=sums[HEARD],
        replayed=sums[REPLAYED],
        off=sums[OFF],
        unknown=due - sums[HEARD] - sums[REPLAYED] - sums[OFF],
        unity=unity,
        battery_least=evidence.heartbeats.battery_least,
        flaps=_flaps(evidence),
        reboots=sum(life.start <= boot < life.end for boot in evidence.boots),
        is_open=any(end > _unit(evidence.open_since - day.start) for _, end in due_units),
    )


def _flaps(evidence: _Evidence) -> int:
    """Count the silences that begin in the day and last longer than the offline threshold, in opening hours and
    without blackouts. What was replayed was silence at its time."""
    day = evidence.day
    threshold = max(day.offline_after_s, INTERVALS_OFFLINE * evidence.heartbeats.interval_s)
    silences: list[Range] = []
    for piece in evidence.pieces:
        if piece.kind != HEARD:
            joined = silences and silences[-1].end >= piece.start
            start = silences.pop().start if joined else piece.start
            silences.append(Range(start, min(piece.end, day.revoked)))
    long = [one for one in silences if day.start <= one.start < day.start + DAY_S and one.end - one.start > threshold]
    if not long:
        return 0
    due = list(without(day.open, day.blackouts))
    return sum(overlap(due, *one) > threshold for one in long)


def _unit(offset_s: float) -> int:
    """Return the tenth of a minute at which this second of the day is; times outside the day are its ends."""
    return round(min(max(offset_s, 0.0), DAY_S) / UNIT_S)


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


# ---- ranges: sorted, without overlaps -------------------------------------------------------------------------------


def within(ranges: Iterable[Range], bounds: Range) -> Iterator[Range]:
    """Yield the parts of the ranges that lie in `bounds`."""
    for start, end in ranges:
        if start < bounds.end and end > bounds.start:
            yield Range(max(start, bounds.start), min(end, bounds.end))


def without(ranges: Iterable[Range], removed: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of the ranges that lie in none of `removed`."""
    for begin, end in ranges:
        start = begin
        for hole in removed:
            if hole.end <= start:
                continue
            if hole.start >= end:
                break
            if hole.start > start:
                yield Range(start, hole.start)
            start = hole.end
        if start < end:
            yield Range(start, end)


def overlap(ranges: Sequence[Range], start: float, end: float) -> float:
    """Return for how long the ranges overlap with the time from `start` to `end`."""
    return sum(max(min(end, one.end) - max(start, one.start), 0.0) for one in ranges)
