"""The rules of docs/decisions/0015-messages.md, applied to the incidents of a script: which messages there must be. An
oracle for nexhb/messages, with which it shares no code. Times are seconds since the beginning of the script."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from bench.sim.script import OPENS, ROUTES, Kiosk, Route, Script, local_hour
from tests.support.watching_truth import Incident, is_open, next_round

SEVERITIES = ("info", "warning", "critical")
SCOPES = ("device", "site", "fleet", "ours")  # narrow to wide
EDGE = 20.0  # a message that is due so close before the end need not be there


class Message(NamedTuple):
    """A message to a route."""

    kind: str
    scope: str
    at: float


@dataclass(slots=True)
class _Told:
    """What a route was told of an incident."""

    scope: str
    reminded_at: float
    of_another_fault: bool = False  # which the incident replaces
    is_over: bool = False


class Expected:
    """Works out which messages there must be about these incidents."""

    def __init__(self, script: Script, incidents: Sequence[Incident]) -> None:
        self.script = script
        self.incidents = incidents
        self.kiosks = {kiosk.number: kiosk for kiosk in script.kiosks}
        self.sites = {kiosk.site: kiosk for kiosk in script.kiosks}
        self.told: dict[tuple[int, str], _Told] = {}
        self.messages: dict[tuple[int, str], list[Message]] = defaultdict(list)
        self.moments: list[float] = []
        self.absorbed: dict[int, list[Incident]] = defaultdict(list)
        for one in incidents:
            if one.absorbed_into is not None:
                self.absorbed[id(one.absorbed_into)].append(one)

    def all(self) -> Mapping[tuple[int, str], list[Message]]:
        """Return the messages about each incident (its `id`) on each route."""
        script = self.script
        times = [silence.end for silence in script.silences]
        times += [at for hour in {OPENS, *(r.quiet[1] for r in ROUTES if r.quiet)} for at in script.each_day_at(hour)]
        for one in self.incidents:
            times += [one.opened, one.resolved, *(at for at, _, _ in one.scopes), *one.devices.values()]
        self.moments = sorted({_round(at, script) for at in times if at < script.end})
        coming = sorted(self.incidents, key=lambda one: one.opened, reverse=True)
        live: list[Incident] = []
        last = -1.0
        while self.moments:
            if (t := heapq.heappop(self.moments)) == last:
                continue
            last = t
            while coming and coming[-1].opened <= t:
                live.append(coming.pop())
            live = [one for one in live if self._tell(one, t)]
        return self.messages

    def _tell(self, one: Incident, t: float) -> bool:
        """Add the messages about an incident that are due at `t`. Return whether more may follow."""
        is_ended = one.resolved <= t
        if is_ended and (one.is_quiet or one.absorbed_into is not None):
            return False
        is_held = self._is_held(one, t)
        for route in ROUTES:
            if not is_held and not self._is_quiet(route, t):
                self._tell_route(one, route, t, is_ended=is_ended)
            else:
                self._inherit(one, route, t)
        told = [each for route in ROUTES if (each := self.told.get((id(one), route.name)))]
        waits = one.continues is not None and is_held
        return not is_ended or waits or any(not each.is_over for each in told)

    def _tell_route(self, one: Incident, route: Route, t: float, *, is_ended: bool) -> None:
        told = self._inherit(one, route, t)
        key, (scope, _) = (id(one), route.name), _place(one, t)
        if told is None or (told.of_another_fault and not is_ended):
            if not is_ended and self._concerns(one, route, t):
                self._add(key, Message("opened", scope, t), route)
        elif told.is_over:
            return
        elif is_ended:
            told.is_over = True
            self.messages[key].append(Message("resolved", scope, t))
        elif SCOPES.index(scope) > SCOPES.index(told.scope):
            self._add(key, Message("widened", scope, t), route)
        elif route.reminder and t - told.reminded_at >= route.reminder:
            self._add(key, Message("reminder", scope, t), route)

    def _inherit(self, one: Incident, route: Route, t: float) -> _Told | None:
        """Return what a route was told of an incident, or before of the one that it continues or of those that it has
        absorbed."""
        key = (id(one), route.name)
        if key not in self.told:
            earlier = [each for each in (one.continues, *self.absorbed[id(one)]) if each and each.opened <= t]
            earlier = [each for each in earlier if each.absorbed_into is None or each.resolved <= t]
            known = [(told, each) for each in earlier if (told := self.told.get((id(each), route.name)))]
            if known:
                told, other = max(known, key=lambda pair: pair[0].reminded_at)
                is_new = other.kind != one.kind and self._concerns(one, route, t)
                self.told[key] = _Told(told.scope, told.reminded_at, is_new)
        return self.told.get(key)

    def _add(self, key: tuple[int, str], message: Message, route: Route) -> None:
        self.told[key] = _Told(message.scope, message.at)
        self.messages[key].append(message)
        if route.reminder:
            at = _round(message.at + route.reminder, self.script)
            if at < self.script.end:
                heapq.heappush(self.moments, at)

    # ---- who, and when ------------------------------------------------------------------------------------------

    def _concerns(self, one: Incident, route: Route, t: float) -> bool:
        scope, site = _place(one, t)
        if scope == "ours":
            return route.for_nexhb
        severity = "critical" if scope != "device" else "warning" if one.kind in ("offline", "unity_down") else "info"
        if one.kind not in route.kinds or SEVERITIES.index(severity) < SEVERITIES.index(route.severity):
            return False
        if scope == "fleet":
            return True
        has_tag = any(route.tag in kiosk.tags for kiosk in self._kiosks(one, t))
        return (not route.sites or site in route.sites) and (not route.tag or has_tag)

    def _is_held(self, one: Incident, t: float) -> bool:
        scope, site = _place(one, t)
        if scope == "ours":
            return False
        silenced = {(each.scope, each.value) for each in self.script.silences if each.start <= t < each.end}
        if ("fleet", None) in silenced or ("site", site) in silenced:
            return True
        if silenced and all(
            {("device", kiosk.id), ("site", kiosk.site), *(("tag", tag) for tag in kiosk.tags)} & silenced
            for kiosk in self._kiosks(one, t)
        ):
            return True
        return site is not None and not is_open(self.sites[site], t, self.script)

    def _is_quiet(self, route: Route, t: float) -> bool:
        return route.quiet is not None and not route.quiet[1] <= local_hour(self.script.at(t)) < route.quiet[0]

    def _kiosks(self, one: Incident, t: float) -> list[Kiosk]:
        t = max(t, min(one.devices.values()))  # the incident may have been found a round earlier
        return [self.kiosks[number] for number, since in one.devices.items() if since <= t]


def _place(one: Incident, t: float) -> tuple[str, str | None]:
    """Return the scope and the site of an incident at `t`."""
    return next(place for since, *place in reversed(one.scopes) if since <= t or since == one.scopes[0][0])  # type: ignore[return-value]


def _round(t: float, script: Script) -> float:
    """Return the first round at `t` or later."""
    return next_round(math.nextafter(t, -1), script.ours)


# ---- the comparison -------------------------------------------------------------------------------------------------


def differences(
    script: Script, pairs: Mapping[int, Incident], sent: Iterable[Any], received: Sequence[Any]
) -> list[str]:
    """Return each difference in a sentence. `pairs`: for each incident_id of the database the incident that it is;
    `sent`: the outbox, in order; `received`: what the receiver got."""
    expected = Expected(script, list(pairs.values())).all()
    actual: dict[tuple[int, str], list[Message]] = defaultdict(list)
    rows = list(sent)
    wrong = []
    for row in rows:
        if one := pairs.get(row["incident_id"]):
            at = (row["created_at"] - script.start).total_seconds()
            actual[id(one), row["route"]].append(Message(row["kind"], row["scope"], at))
    for number, one in pairs.items():
        for route in ROUTES:
            right, found = expected.get((id(one), route.name), []), actual[id(one), route.name]
            if not _agree(right, found, one.slack, script.end):
                what = f"{one.kind} of {one.scope} {one.site or ''} {one.number or ''} (incident {number})"
                wrong.append(f"{route.name}: {what}: {_shown(script, found)} instead of {_shown(script, right)}.")
    return wrong + _received(script, rows, received)


def _agree(right: Sequence[Message], found: Sequence[Message], slack: float, end: float) -> bool:
    due = [one for one in right if one.at < end - EDGE - slack]
    longest = max(len(due), len(found))
    return len(right) >= longest and all(
        one[:2] == other[:2] and abs(one.at - other.at) <= max(slack, 15.0)
        for one, other in zip(right[:longest], found, strict=False)
    ) and len(found) >= len(due)  # fmt: skip


def _received(script: Script, rows: Sequence[Any], received: Sequence[Any]) -> list[str]:
    """Return what is wrong with what arrived: each message once, in the order of its incident and route, and two
    messages of each outage of ours."""
    wrong = []
    of_incidents = [each for each in received if each.body["type"].startswith("incident.")]
    if sorted(each.message_id for each in of_incidents) != sorted(row["id"] for row in rows):
        wrong.append("What was received is not what is in the outbox.")
    key_of = {row["id"]: (row["incident_id"], row["route"]) for row in rows}
    order: dict[tuple[int, str], list[str]] = defaultdict(list)
    for each in of_incidents:
        order[key_of.get(each.message_id, (0, ""))].append(each.message_id)
    right: dict[tuple[int, str], list[str]] = defaultdict(list)
    for row in rows:
        right[key_of[row["id"]]].append(row["id"])
    wrong += [f"{key}: the order of the messages is wrong." for key, ids in right.items() if order[key] != ids]
    own = [
        (each.path.removeprefix("/"), each.body["type"], each.body["data"]["since"])
        for each in received if each.body["type"].startswith("nexhb.")
    ]  # fmt: skip
    due = [
        (route.name, kind, _iso(script.at(down)))
        for down, up in script.ours if up < script.end
        for kind in ("nexhb.not_ready", "nexhb.ready")
        for route in ROUTES if route.for_nexhb
    ]  # fmt: skip
    return wrong + ([] if own == due else [f"Of outages of ours was told: {own}, instead of {due}."])


def _iso(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def _shown(script: Script, messages: Sequence[Message]) -> str:
    return ", ".join(f"{one.kind} {one.scope} {script.at(one.at):%d %H:%M:%S}" for one in messages) or "nothing"
