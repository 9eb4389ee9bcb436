"""The script of a simulation: the kiosks, and what happens to each of them and when. Its seed determines it. Pure.

Times are seconds since the beginning of the simulation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0
CALM = 3 * HOUR  # nothing happens in the first hours, so that the intervals of all kiosks are known
DST = datetime(2026, 3, 29, 12, tzinfo=UTC)  # noon of the day on which daylight saving time begins in Europe
ZONE, OPENS, CLOSES = "Europe/Berlin", 8, 20  # the hours of those sites that have hours
_ZONE = ZoneInfo(ZONE)

# Conditions that a kiosk can have for a span of time.
# No line, no power, battery empty, agent stopped, Unity down, clock wrong.
LINE, POWER, FLAT, AGENT, UNITY, CLOCK = "line", "power", "flat", "agent", "unity", "clock"
CLONE = "clone"  # another kiosk sends with the same token


class Truth(NamedTuple):
    """A condition that a kiosk has while `start` ≤ t < `end`."""

    kind: str
    start: float
    end: float


class Silence(NamedTuple):
    """A silence of `value` (a site, a tag, a kiosk; None: the fleet) while `start` ≤ t < `end`."""

    scope: str
    value: str | None
    start: float
    end: float


class Route(NamedTuple):
    """A route: for incidents of these kinds, of at least this severity, of these sites and with this tag."""

    name: str
    kinds: tuple[str, ...] = ("offline", "unity_down")
    severity: str = "info"
    sites: tuple[str, ...] = ()
    tag: str = ""
    quiet: tuple[int, int] | None = None  # from this hour until this hour of the next day, in ZONE
    reminder: float = 0.0
    for_nexhb: bool = False


TAG = "vip"  # of every 25th kiosk
ROUTES = (
    Route("everything", ("offline", "unity_down", "battery_low", "clock_wrong", "token_shared", "flapping")),
    Route("urgent", severity="critical"),
    Route("stores", sites=("site-00", "site-01", "site-05"), reminder=30 * MINUTE),
    Route("night", severity="warning", quiet=(22, 6), reminder=6 * HOUR),
    Route("vips", tag=TAG),
    Route("ours", ("token_shared",), for_nexhb=True),
)


@dataclass(slots=True)
class Kiosk:
    """A kiosk, and everything that happens to it."""

    number: int
    site: str
    has_hours: bool
    interval: float
    latency: float
    sends_queue_first: bool  # after its line was down; other kiosks send a live heartbeat first
    updated_at: float  # when it gets another version of the agent
    truths: list[Truth] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The device_id."""
        return f"kiosk-{self.number:04d}"

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that an operator gave it."""
        return (TAG,) if self.number % 25 == 0 else ()

    def truth(self, t: float, *kinds: str) -> Truth | None:
        """Return the kiosk's condition at `t` that is of one of these kinds, or None."""
        return next((each for each in self.truths if each.start <= t < each.end and each.kind in kinds), None)


@dataclass(frozen=True, slots=True)
class Script:
    """The whole simulation: its kiosks, and everything that happens to them and to nexhb."""

    seed: int
    start: datetime
    end: float
    kiosks: Sequence[Kiosk]
    ours: Sequence[tuple[float, float]]  # when nexhb accepts no heartbeats
    silences: Sequence[Silence] = ()
    disk: Sequence[tuple[float, float]] = ()  # when the disk is almost full

    def at(self, t: float) -> datetime:
        """Return a moment of the simulation as a time."""
        return self.start + timedelta(seconds=t)

    def each_day_at(self, hour: int) -> list[float]:
        """Return the times at which this hour begins in ZONE."""
        hours = (t for t in range(0, int(self.end) + 1, int(HOUR)))
        return [float(t) for t in hours if local_hour(self.at(t)) == hour]


def local_hour(at: datetime) -> int:
    """Return the hour in ZONE."""
    return at.astimezone(_ZONE).hour


def write(seed: int, days: int, kiosks: int, sites: int) -> Script:
    """Return the script of a seed."""
    rng = random.Random(f"script {seed}")
    start, end = DST - timedelta(days=(days + 1) // 2), days * DAY
    fleet = [
        Kiosk(
            number, f"site-{number % sites:02d}", number % sites % 3 == 0, 600.0 if rng.random() < 0.1 else 60.0,
            5.0 if number <= 10 else 0.2, rng.random() < 0.2, rng.uniform(CALM, end * 2),
        )
        for number in range(1, kiosks + 1)
    ]  # fmt: skip
    night = 11.5 * HOUR + (days // 2) * DAY  # before midnight in UTC
    ours = [(4 * HOUR, 4 * HOUR + 15 * MINUTE), (night, night + (8 if days > 2 else 3) * HOUR)]
    begins = _moment(rng, end, 2 * HOUR, ours)  # of a fault of the network that two thirds of the sites share
    _happen([kiosk for kiosk in fleet if kiosk.number % sites * 3 < sites * 2], LINE, begins, begins + 40 * MINUTE)
    _sites(rng, fleet, sites, end, ours)
    _kiosks(rng, fleet, end, days, ours)
    for kiosk in fleet:
        kiosk.truths.sort(key=lambda each: each.start)
    disk = _moment(rng, end, HOUR, ours)
    return Script(seed, start, end, fleet, ours, _silences(rng, fleet, end), [(disk, disk + 40 * MINUTE)])


def _silences(rng: random.Random, fleet: Sequence[Kiosk], end: float) -> list[Silence]:
    """Silence some of what happens: all of it, its beginning, or its end; and at random a tag, and the whole fleet."""
    happens = {("site", each.site, truth) for each in fleet for truth in each.truths if _of_site(fleet, each, truth)}
    single = [("device", each.id, truth) for each in fleet for truth in each.truths if rng.random() < 0.2]
    silences = []
    for nth, (scope, value, truth) in enumerate([*sorted(happens), *single]):
        length = truth.end - truth.start
        before, after = rng.uniform(60, 900), rng.uniform(HOUR, 2 * HOUR)
        start = truth.start + (length * 0.7 + 630 if nth % 4 == 2 else -before)
        until = truth.start + (length * 0.6 + 650 if nth % 4 == 1 else length + after)
        if nth % 4 < 3 and start < until:
            silences.append(Silence(scope, value, start, until))
    others: tuple[tuple[str, str | None], ...] = (("tag", TAG), ("fleet", None))
    for kind, name in others * max(1, round(end / DAY / 4)):
        start = rng.uniform(CALM, end - HOUR)
        silences.append(Silence(kind, name, start, start + rng.uniform(HOUR, 3 * HOUR)))
    return silences


def _of_site(fleet: Sequence[Kiosk], kiosk: Kiosk, truth: Truth) -> bool:
    """Return whether something happens to several kiosks of a site at once."""
    return sum(truth in each.truths for each in fleet if each.site == kiosk.site) > 1


def _sites(
    rng: random.Random, fleet: Sequence[Kiosk], sites: int, end: float, ours: Sequence[tuple[float, float]]
) -> None:
    """Let lines of stores fail, a store lose its power, and a router decline."""
    by_site = [[kiosk for kiosk in fleet if kiosk.site == f"site-{n:02d}"] for n in range(sites)]
    for place in by_site[: max(2, sites // 3)]:
        begins = _moment(rng, end, 2 * HOUR, ours)
        kind = LINE if place is by_site[0] else rng.choice((LINE, POWER))
        _happen(place, kind, begins, begins + rng.uniform(20 * MINUTE, 2 * HOUR))
    t, length = CALM + 3 * HOUR, 2 * MINUTE
    while t + 2 * HOUR < end and length < 2 * HOUR:
        if _is_free(t, t + length, ours):
            _happen(by_site[-1], LINE, t, t + length)
        t, length = t + max(2 * HOUR, length * 4), length * 1.8


def _kiosks(
    rng: random.Random, fleet: Sequence[Kiosk], end: float, days: int, ours: Sequence[tuple[float, float]]
) -> None:
    """Let single kiosks fail in every way, each kind at least once."""
    kinds = (LINE, POWER, FLAT, AGENT, UNITY, CLOCK, "flapping", "late_crash")
    count = max(len(kinds) * 2, len(fleet) * days // 10)
    for n in range(count + 1 + days // 4):
        kind, kiosk = kinds[n % len(kinds)], rng.choice(fleet)
        if n >= count:
            kind, kiosk = CLONE, rng.choice([each for each in fleet if not each.truths and each.interval < HOUR / 10])
        t, length = _moment(rng, end, 3 * HOUR, ours), rng.uniform(13 * MINUTE, 2.5 * HOUR)
        if kind == "flapping":
            if _is_idle(kiosk, t, t + HOUR):
                kiosk.truths += [Truth(UNITY, t + k * 10 * MINUTE, t + k * 10 * MINUTE + 300) for k in range(5)]
        elif kind == "late_crash":  # Unity is down for a while in the middle of a time without the line
            if _is_idle(kiosk, t, t + 2 * HOUR):
                kiosk.sends_queue_first = True
                kiosk.truths += [Truth(LINE, t, t + 1.5 * HOUR), Truth(UNITY, t + 600, t + HOUR)]
        else:
            _happen([kiosk], kind, t, t + length)


def _moment(rng: random.Random, end: float, length: float, ours: Sequence[tuple[float, float]]) -> float:
    """Return a random moment that is followed by `length` without an outage of ours."""
    while True:
        t = rng.uniform(CALM, end - length - 2 * HOUR)
        if _is_free(t, t + length, ours):
            return t


def _is_free(start: float, end: float, ours: Sequence[tuple[float, float]]) -> bool:
    return all(end < down - HOUR or start > up + HOUR for down, up in ours)


def _is_idle(kiosk: Kiosk, start: float, end: float) -> bool:
    return all(end < each.start - 4 * HOUR or start > each.end + 4 * HOUR for each in kiosk.truths)


def _happen(kiosks: Sequence[Kiosk], kind: str, start: float, end: float) -> None:
    """Let something happen to these kiosks, unless something else happens to them at about the same time."""
    for kiosk in kiosks:
        if _is_idle(kiosk, start, end):
            kiosk.truths.append(Truth(kind, start, end))
