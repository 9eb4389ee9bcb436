"""Compare what the watcher recorded with what the rules require."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bench.sim.play import Found
from bench.sim.script import Script
from bench.sim.uptime import compare_uptime
from tests.support import messages_truth
from tests.support import watching_truth as rules
from tests.support.watching_truth import Event, Incident, Known

CAUSES_RIGHT = 0.95
EDGE = 10.0  # a change so close before the end need not be found


def differences(script: Script, found: Found) -> list[str]:
    """Return each difference in a sentence."""
    known = {kiosk.number: rules.of_kiosk(kiosk, script) for kiosk in script.kiosks}
    pairs, wrong = _incidents(script, rules.incidents(script, known), found)
    return [
        *_events(script, known, found),
        *_presence(script, known, found),
        *_causes(script, known, found),
        *wrong,
        *messages_truth.differences(script, pairs, found.messages, found.received),
        *compare_uptime(script, found.days),
    ]


def _events(script: Script, known: dict[int, Known], found: Found) -> list[str]:
    left: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for row in found.events:
        since, at = (_seconds(script, row[name]) for name in ("since", "at"))
        left[row["device_no"], row["kind"]].append((since, at))
    wrong = []
    for event in (event for each in known.values() for event in each.events):
        same = left[event.number, event.kind]
        match = next((one for one in same if _fits(event, *one)), None)
        if match is not None:
            same.remove(match)
        elif event.at < script.end - EDGE - event.slack:
            wrong.append(f"{_time(script, event.at)} kiosk {event.number}: {event.kind} was not found.")
    wrong += [
        f"{_time(script, at)} kiosk {number}: {kind} (since {_time(script, since)}) is invented."
        for (number, kind), rest in left.items() for since, at in rest
    ]  # fmt: skip
    return wrong


def _fits(event: Event, since: float, at: float) -> bool:
    return -2 <= since - event.since <= event.slack - 13 and -1 <= at - event.at <= event.slack


def _presence(script: Script, known: dict[int, Known], found: Found) -> list[str]:
    wrong = []
    for t, offline in found.offline:
        right = {
            number for number, each in known.items() if any(one.at <= t and one.until >= t for one in each.outages)
        }
        edges = {
            number
            for number, each in known.items()
            if any(min(abs(one.at - t), abs(one.until - t)) <= 15 for one in each.outages)
        }
        if odd := (right ^ offline) - edges:
            wrong.append(f"{_time(script, t)}: the presence of kiosks {sorted(odd)} is wrong.")
    return wrong


def _causes(script: Script, known: dict[int, Known], found: Found) -> list[str]:
    causes = {
        (row["device_no"], round(_seconds(script, row["since"]))): row["cause"]
        for row in found.outages if row["settled_at"] is not None
    }  # fmt: skip
    pairs = [
        (outage, causes[key])
        for each in known.values() for outage in each.outages
        if outage.cause and (key := (outage.number, round(outage.since))) in causes
    ]  # fmt: skip
    wrong = [(outage, cause) for outage, cause in pairs if outage.cause != cause]
    if len(wrong) <= (1 - CAUSES_RIGHT) * len(pairs):
        return []
    return [
        f"{_time(script, outage.at)} kiosk {outage.number}: the cause is {outage.cause}, not {cause}."
        for outage, cause in wrong
    ]


def _incidents(script: Script, right: Sequence[Incident], found: Found) -> tuple[dict[int, Incident], list[str]]:
    """Return which incident each incident_id is, with the times at which it was recorded; and the differences."""
    left = list(found.incidents)
    pairs: dict[int, Incident] = {}
    wrong = []
    for one in right:
        match = next((row for row in left if _is_same(script, one, row)), None)
        if match is not None:
            left.remove(match)
            pairs[match["incident_id"]] = one
            one.opened, one.resolved = (_seconds(script, match[name]) for name in ("opened_at", "resolved_at"))
        elif one.opened < script.end - EDGE - one.slack:
            wrong.append(
                f"{_time(script, one.opened)} {one.scope} {one.site} {one.number or ''}: no incident {one.kind} until"
                f" {_time(script, one.resolved)}."
            )
    for row in left:
        opened, resolved = _seconds(script, row["opened_at"]), _seconds(script, row["resolved_at"])
        wrong.append(
            f"{_time(script, opened)} {row['scope']} {row['site']} {row['device_no'] or ''}: the incident {row['kind']}"
            f" until {_time(script, resolved)} is invented."
        )
    return pairs, wrong


def _is_same(script: Script, one: Incident, row: Any) -> bool:
    if (one.kind, one.scope, one.site, one.number) != tuple(row[:4]):
        return False
    opened, resolved = _seconds(script, row["opened_at"]), _seconds(script, row["resolved_at"])
    ends = [min(each, script.end - EDGE) for each in (one.resolved, resolved)]
    return abs(one.opened - opened) <= one.slack and abs(ends[0] - ends[1]) <= one.slack + EDGE


def _seconds(script: Script, at: datetime | None) -> float:
    return rules.NEVER if at is None else (at - script.start).total_seconds()


def _time(script: Script, t: float) -> str:
    return "the end" if t == rules.NEVER else f"{script.at(t):%d %H:%M:%S}"
