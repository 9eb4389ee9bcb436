"""The rules of docs/decisions/0014-watching.md, applied to a script of bench/sim: which events, outages and incidents
there must be. An oracle for nexhb/watching, with which it shares no code."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from statistics import median_low
from zoneinfo import ZoneInfo

from bench.sim.agent import Sent, sent_by
from bench.sim.script import AGENT, CLOSES, FLAT, HOUR, LINE, OPENS, POWER, ZONE, Kiosk, Script, local_hour

OFFLINE_AFTER = 600.0
WAIT = 375.0 + 60.0  # after an outage of ours: the agent's longest pause, and an interval
TICK = 10.0
RECHECK = 120.0
SWITCHES = 3  # between two kiosks that share a token
LOW, OK = 15, 20  # the charge of the battery
_ZONE = ZoneInfo(ZONE)
NEVER = float("inf")
_COMBINED = ("offline", "unity_down")
_CAUSES = {LINE: "network", POWER: "power", FLAT: "battery", AGENT: "app"}

Ours = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Event:
    """An event that must be recorded at `at`, or up to `slack` later."""

    number: int
    kind: str
    since: float
    at: float
    slack: float = 15.0


@dataclass(slots=True)
class Fault:
    """A state of a kiosk that is a reason for an incident while `due` ≤ t < `end`."""

    number: int
    site: str
    kind: str
    due: float
    end: float
    slack: float = 15.0


@dataclass(slots=True)
class Outage:
    """A kiosk was offline."""

    number: int
    since: float
    until: float
    cause: str  # empty: nothing happened, but the interval of the kiosk was not known yet
    at: float  # when it was found


@dataclass(slots=True)
class Known:
    """What the watcher must record about one kiosk."""

    events: list[Event] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # longer than one and a half intervals
    unity_down: list[tuple[float, float]] = field(default_factory=list)  # by the newest heartbeat


@dataclass(slots=True)
class Incident:
    """An incident that must be recorded."""

    kind: str
    scope: str
    site: str | None
    number: int | None
    opened: float
    slack: float
    resolved: float = NEVER
    members: set[int] = field(default_factory=set)
    devices: dict[int, float] = field(default_factory=dict)  # each kiosk that had the fault, and since when
    mostly_back: float | None = None
    scopes: list[tuple[float, str, str | None]] = field(default_factory=list)  # since when, scope, site
    continues: Incident | None = None
    absorbed_into: Incident | None = None
    is_quiet: bool = False  # it ended because the watcher adopted the state that it found


# ---- silence --------------------------------------------------------------------------------------------------------


def silent_at(heard: float, limit: float, ours: Ours) -> float:
    """Return when a kiosk that was last heard at `heard` has been silent for `limit`; outages of ours, and the wait
    after each, do not count."""
    t, left = heard, limit
    for down, up in ours:
        if up <= heard:
            continue
        if down - t >= left:
            break
        left -= max(down - t, 0)
        t = max(t, up + WAIT)
    return t + left


def next_round(t: float, ours: Ours) -> float:
    """Return the first round after `t`; there are none in an outage of ours, and none after NEVER."""
    if t == NEVER:
        return NEVER
    for down, up in ours:
        if down <= t < up:
            t = up
    return (t // TICK + 1) * TICK


def is_open(kiosk: Kiosk, t: float, script: Script) -> bool:
    """Return whether the kiosk's site is open."""
    return not kiosk.has_hours or OPENS <= local_hour(script.at(t)) < CLOSES


def _opening(kiosk: Kiosk, t: float, script: Script) -> float:
    """Return `t` if the site is open then, otherwise when it opens."""
    if is_open(kiosk, t, script):
        return t
    local = script.at(t).astimezone(_ZONE)
    day = local if local.hour < OPENS else local + timedelta(days=1)
    return _seconds(day.replace(hour=OPENS, minute=0, second=0, microsecond=0), script)


def _seconds(local: datetime, script: Script) -> float:
    return (local.astimezone(UTC) - script.start).total_seconds()


def _due_offline(kiosk: Kiosk, heard: float, found: float, limit: float, script: Script) -> float:
    """Return when the silence is due: when it has exceeded `limit` in open time, and the site is open."""
    if not kiosk.has_hours:
        return found
    t, left = heard, limit
    while t < script.end:
        if not is_open(kiosk, t, script):
            t = _opening(kiosk, t, script)
            continue
        closes = script.at(t).astimezone(_ZONE).replace(hour=CLOSES, minute=0, second=0, microsecond=0)
        span = _seconds(closes, script) - t
        if span >= left:
            return max(_opening(kiosk, max(found, t + left), script), found)
        left, t = left - span, t + span
    return NEVER


# ---- one kiosk ------------------------------------------------------------------------------------------------------


def of_kiosk(kiosk: Kiosk, script: Script) -> Known:
    """Return what the watcher must record about one kiosk."""
    known = Known()
    content = _Content(kiosk, script, known)
    made: list[float] = []
    heard: float | None = None
    usual = min(1.3 * kiosk.interval, OFFLINE_AFTER)
    was_cloned, switches = False, list[float]()
    for sent in sent_by(kiosk, script):
        if sent.cloned != was_cloned:
            was_cloned = sent.cloned
            switches.append(sent.at)
        if heard is not None and sent.at - heard <= usual and content.repeats(sent):
            made.append(sent.made)
            heard = sent.at
            continue
        if heard is not None and sent.at - heard > OFFLINE_AFTER:
            _silence(kiosk, script, known, (heard, sent.at), made[-11:])
        if heard is not None and sent.at - heard > 1.3 * kiosk.interval:
            known.gaps.append((heard, sent.at))
        _remember(made, sent.made)
        content.add(sent)
        heard = sent.at
    if heard is not None:
        known.gaps.append((heard, NEVER))
        _silence(kiosk, script, known, (heard, NEVER), made[-11:])
    content.end()
    _share(kiosk, known, switches, script)
    _flap(kiosk, known, script)
    known.events.sort(key=lambda event: event.at)
    return known


def _remember(made: list[float], at: float) -> None:
    if made and at < made[-1]:
        insort(made, at)
    else:
        made.append(at)
    del made[:-11]


def _silence(kiosk: Kiosk, script: Script, known: Known, gap: tuple[float, float], made: Sequence[float]) -> None:
    heard, until = gap
    distances = [newer - older for older, newer in pairwise(made)]
    limit = max(OFFLINE_AFTER, 2.5 * (median_low(distances) if distances else 60.0))
    found = next_round(silent_at(heard, limit, script.ours), script.ours)
    if found >= min(until, script.end + TICK):
        return
    known.events.append(Event(kiosk.number, "offline", heard, found))
    if until < NEVER:
        known.events.append(Event(kiosk.number, "online", until, next_round(until, script.ours)))
    known.outages.append(Outage(kiosk.number, heard, until, _cause(kiosk, heard, until, script), found))
    due = _due_offline(kiosk, heard, found, limit, script)
    known.faults.append(Fault(kiosk.number, kiosk.site, "offline", due, next_round(until, script.ours)))


def _cause(kiosk: Kiosk, heard: float, until: float, script: Script) -> str:
    """Return the cause that the script knows."""
    ours = sum(max(0.0, min(up, until) - max(down, heard)) for down, up in script.ours)
    if ours * 2 > until - heard:
        return "ours"
    kinds = [each.kind for each in kiosk.truths if each.start < until and each.end > heard and each.kind in _CAUSES]
    return _CAUSES[kinds[0]] if kinds else ""


class _Content:
    """Applies the rules of content to what a kiosk sends."""

    def __init__(self, kiosk: Kiosk, script: Script, known: Known) -> None:
        self.kiosk, self.script, self.known = kiosk, script, known
        self.states: dict[str, bool] = {"unity_down": False, "battery_low": False, "clock_wrong": False}
        self.open: dict[str, Fault] = {}
        self.version = ""
        self.newest: Sent | None = None
        self.was_late = False
        self.down_since: float | None = None

    def repeats(self, sent: Sent) -> bool:
        """Return whether a heartbeat states what the newest one states, and make it the newest: a shortcut."""
        newest = self.newest
        if (
            newest is None
            or self.was_late
            or sent[3:] != newest[3:]
            or sent.queued
            or sent.cloned
            or sent.made <= newest.made
        ):
            return False
        self.newest = sent
        return True

    def add(self, sent: Sent) -> None:
        newest = self.newest
        if newest is not None and sent.made < newest.made:
            return
        found = next_round(sent.at, self.script.ours)
        if newest is not None and sent.boot > newest.boot:
            self.known.events.append(Event(sent.number, "rebooted", sent.boot, found))
        if sent.unity == (self.down_since is not None):
            if sent.unity and self.down_since is not None:
                self.known.unity_down.append((self.down_since, sent.at))
            self.down_since = None if sent.unity else sent.at
        is_late = sent.at - sent.made > OFFLINE_AFTER
        if not is_late:
            self._change(sent, found, (RECHECK + self.kiosk.interval if self.was_late else 0.0) + 15.0)
        self.newest, self.was_late = sent, is_late

    def _change(self, sent: Sent, found: float, slack: float) -> None:
        if self.version not in ("", sent.version):
            self.known.events.append(Event(sent.number, "app_changed", sent.at, found, slack))
        self.version = sent.version
        low = sent.battery_pct <= LOW or (self.states["battery_low"] and sent.battery_pct < OK)
        now = {"unity_down": not sent.unity, "battery_low": low, "clock_wrong": sent.clock_wrong}
        ends = {"unity_down": "unity_up", "battery_low": "battery_ok", "clock_wrong": "clock_right"}
        for kind, is_so in now.items():
            if is_so == self.states[kind]:
                continue
            self.known.events.append(Event(sent.number, kind if is_so else ends[kind], sent.at, found, slack))
            if is_so:
                due = next_round(_opening(self.kiosk, found, self.script) - 1, self.script.ours)
                self.open[kind] = Fault(sent.number, self.kiosk.site, kind, max(due, found), NEVER, slack)
            else:
                self._close(kind, found)
        self.states = now

    def _close(self, kind: str, at: float) -> None:
        fault = self.open.pop(kind)
        fault.end = at
        self.known.faults.append(fault)

    def end(self) -> None:
        for kind in list(self.open):
            self._close(kind, NEVER)
        if self.down_since is not None:
            self.known.unity_down.append((self.down_since, NEVER))


def _share(kiosk: Kiosk, known: Known, switches: Sequence[float], script: Script) -> None:
    """Add that two kiosks share a token: from the third switch between them until an hour after the last one."""
    if len(switches) < SWITCHES:
        return
    since, slack = switches[SWITCHES - 1], 4 * 60.0
    found = next_round(since, script.ours)
    known.events.append(Event(kiosk.number, "token_shared", since, found, 75.0))
    known.faults.append(Fault(kiosk.number, kiosk.site, "token_shared", found, switches[-1] + HOUR, slack))


def _flap(kiosk: Kiosk, known: Known, script: Script) -> None:
    """Add the flapping of a kiosk, which replaces its other faults."""
    flips = sorted(
        (event.at if event.kind == "offline" else event.since, event.at)
        for event in known.events if event.kind in ("offline", "online", "unity_down", "unity_up")
    )  # fmt: skip
    recent: list[float] = []
    since: float | None = None
    spans: list[tuple[float, float]] = []
    for flip, found in [*flips, (NEVER, NEVER)]:
        if since is not None and recent and flip - recent[-1] >= HOUR:
            spans.append((since, next_round(recent[-1] + HOUR - 1, script.ours)))
            since = None
        recent = [each for each in recent if found - each < HOUR] + [flip]
        if since is None and len(recent) >= 6 and found < NEVER:
            since = found
            known.events.append(Event(kiosk.number, "flapping", recent[0], found))
    for start, end in spans:
        known.faults = [part for fault in known.faults for part in _without(fault, start, end)]
        due = _opening(kiosk, start, script)
        known.faults.append(Fault(kiosk.number, kiosk.site, "flapping", due, end))


def _without(fault: Fault, start: float, end: float) -> Iterator[Fault]:
    """Yield what is left of a fault outside of a time."""
    if fault.end <= start or fault.due >= end:
        yield fault
        return
    if fault.due < start:
        yield Fault(fault.number, fault.site, fault.kind, fault.due, start, fault.slack)
    if fault.end > end:
        yield Fault(fault.number, fault.site, fault.kind, end, fault.end, fault.slack)


# ---- the fleet ------------------------------------------------------------------------------------------------------


def incidents(script: Script, known: Mapping[int, Known]) -> list[Incident]:
    """Return the incidents that the faults of all kiosks must make."""
    kiosks = {kiosk.number: kiosk for kiosk in script.kiosks}
    starts: dict[float, list[Fault]] = defaultdict(list)
    ends: dict[float, list[Fault]] = defaultdict(list)
    for fault in (fault for each in known.values() for fault in each.faults):
        due = fault.due if fault.due % TICK == 0 else next_round(fault.due, script.ours)
        if due < min(fault.end, script.end):
            starts[due].append(fault)
            ends[fault.end].append(fault)
    board = _Board(script, kiosks, known)
    times = sorted({*starts, *ends} - {NEVER})
    for number, t in enumerate(times):
        for fault in ends[t]:
            board.leave(fault, t)
        for kind in sorted({fault.kind for fault in starts[t]}):
            board.add([fault for fault in starts[t] if fault.kind == kind], t)
        following = times[number + 1] if number + 1 < len(times) else script.end
        board.split(following)
    board.all += [
        Incident(
            "disk_low", "ours", None, None, next_round(start, script.ours), 15.0, next_round(end, script.ours),
            scopes=[(start, "ours", None)],
        )
        for start, end in script.disk
    ]  # fmt: skip
    return board.all


@dataclass
class _Board:
    script: Script
    kiosks: Mapping[int, Kiosk]
    known: Mapping[int, Known]
    all: list[Incident] = field(default_factory=list)
    open: list[Incident] = field(default_factory=list)

    def add(self, faults: Sequence[Fault], t: float) -> None:
        kind = faults[0].kind
        if kind not in _COMBINED:
            for fault in faults:
                self._open(kind, "device", [fault], t)
            return
        same = [one for one in self.open if one.kind == kind]
        fleet = next((one for one in same if one.scope == "fleet"), None)
        affected = {no: kiosk for no, kiosk in self.kiosks.items() if self._is_affected(kiosk, kind, t)}
        faulty = {fault.number for fault in faults}.union(*(one.members for one in same))
        affected_sites = {self.kiosks[number].site for number in faulty}
        if fleet is not None or (len(affected) * 2 > len(self.kiosks) and len(affected_sites) > 1):
            self._join_or_open(fleet or self._widened("fleet", None, same, t), "fleet", faults, t)
            return
        for site in sorted({fault.site for fault in faults}):
            of_site = [fault for fault in faults if fault.site == site]
            whole = next((one for one in same if one.scope == "site" and one.site == site), None)
            size = sum(kiosk.site == site for kiosk in self.kiosks.values())
            down = sum(kiosk.site == site for kiosk in affected.values())
            if whole is not None or (down > 1 and down * 2 > size):
                included = [one for one in same if one.scope == "device" and one.site == site]
                self._join_or_open(whole or self._widened("site", site, included, t), "site", of_site, t)
            else:
                for fault in of_site:
                    self._open(kind, "device", [fault], t)

    def _widened(self, scope: str, site: str | None, included: Sequence[Incident], t: float) -> Incident | None:
        """Return the oldest of the included incidents, widened, with the kiosks of the others."""
        if not included:
            return None
        one = included[0]
        one.scope, one.number, one.site = scope, None, site
        one.scopes.append((t, scope, site))
        for other in included[1:]:
            one.members |= other.members
            one.devices |= dict.fromkeys(other.members, t)
            other.resolved, other.absorbed_into = t, one
            self.open.remove(other)
        return one

    def _join_or_open(self, one: Incident | None, scope: str, faults: Sequence[Fault], t: float) -> None:
        if one is None:
            self._open(faults[0].kind, scope, faults, t)
            return
        one.members |= {fault.number for fault in faults}
        one.devices = dict.fromkeys(one.members, t) | one.devices
        self._weigh(one, t)

    def _open(
        self, kind: str, scope: str, faults: Sequence[Fault], t: float, continues: Incident | None = None
    ) -> None:
        numbers = {fault.number for fault in faults}
        site = None if scope == "fleet" else faults[0].site
        slack = max(fault.slack for fault in faults)
        number = faults[0].number if scope == "device" else None
        one = Incident(
            kind, scope, site, number, t, slack, members=set(numbers), devices=dict.fromkeys(numbers, t),
            scopes=[(t, scope, site)], continues=continues,
        )  # fmt: skip
        if kind == "flapping":
            for other in self.all:
                if (other.scope, other.number, other.resolved) == ("device", number, t) and other.kind in _COMBINED:
                    other.absorbed_into = one
        self.all.append(one)
        self.open.append(one)

    def leave(self, fault: Fault, t: float) -> None:
        one = next((one for one in self.open if one.kind == fault.kind and fault.number in one.members), None)
        if one is None:
            return
        one.members.discard(fault.number)
        if not one.members:
            one.resolved = t
            self.open.remove(one)
        else:
            self._weigh(one, t)

    def _weigh(self, one: Incident, t: float) -> None:
        is_back = one.scope != "device" and len(one.members) * 2 < len(one.devices)
        one.mostly_back = (one.mostly_back if one.mostly_back is not None else t) if is_back else None

    def split(self, until: float) -> None:
        """Split the incidents most of whose kiosks have been back for long enough before `until`."""
        for one in [each for each in self.open if each.mostly_back is not None]:
            assert one.mostly_back is not None
            t = one.mostly_back + WAIT
            t = t if t % TICK == 0 else next_round(t, self.script.ours)
            if t < until:
                self.open.remove(one)
                one.resolved = t
                for number in sorted(one.members):
                    site = self.kiosks[number].site
                    self._open(one.kind, "device", [Fault(number, site, one.kind, t, NEVER)], t, one)

    def _is_affected(self, kiosk: Kiosk, kind: str, t: float) -> bool:
        known = self.known[kiosk.number]
        if kind == "unity_down":
            return any(start <= t < end for start, end in known.unity_down)
        limit = 1.5 * kiosk.interval
        return any(heard < t < until and silent_at(heard, limit, self.script.ours) < t for heard, until in known.gaps)
