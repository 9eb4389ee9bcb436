"""Record what a round has found, in the round's transaction: outages, incidents, events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching import causes, incidents, state
from nexhb.watching.affected import FleetCounts, affected_by
from nexhb.watching.causes import First, Gap, Last
from nexhb.watching.incidents import Fault, Incident, Join, Open
from nexhb.watching.judging import Rules, Subject
from nexhb.watching.state import Flip, Habits

_Q = sql.queries("watching")

SHARED_WITHIN = timedelta(hours=1)  # two kiosks share a token until they have not been seen for this long
MAX_NAMED = 20  # devices that an incident names

# The event that ends a fault, and the kind of the fault.
ENDS = {"online": "offline", "unity_up": "unity_down", "battery_ok": "battery_low", "clock_right": "clock_wrong"}

IncidentOf = dict[tuple[int, str], int]  # device_no, kind → incident_id


@dataclass
class Record:
    """What is being recorded in one transaction. Without `presence`, silence is not judged."""

    conn: Connection
    rules: Rules
    presence: Presence | None
    now: datetime
    subjects: Mapping[int, Subject] = field(default_factory=dict)
    counts: FleetCounts = field(default_factory=dict)  # of this round
    events: int = 0
    changed_incidents: list[int] = field(default_factory=list)  # opened, widened or resolved


# ---- outages --------------------------------------------------------------------------------------------------------


async def end_outages(record: Record, flips: Sequence[Flip]) -> Mapping[int, str]:
    """End the outages of devices that were heard again, with the causes known so far. Return these causes."""
    heard_at = {flip.device_no: flip.since for flip in flips if flip.kind == "online"}
    rows = await record.conn.fetch(_Q["ongoing_outages"], list(heard_at)) if heard_at else []
    ended = []
    for row in rows:
        no = row["device_no"]
        subject, cause, evidence = record.subjects[no], row["cause"], {}
        first = _first_after(subject, heard_at[no])
        interval = _habit(subject, record.rules.interval).interval
        last = last_of(row["evidence"], row["since"])
        if first is not None:
            gap = Gap(last, first, interval, blackouts=record.presence.blackouts if record.presence else ())
            cause = causes.preliminary(gap, cause)
            evidence = {"restarted": gap.restarted}
        settle_at = heard_at[no] + causes.settles_after(interval)
        ended.append((row["outage_no"], max(heard_at[no], row["since"]), cause, _json(evidence), settle_at))
    if ended:
        await record.conn.execute(_Q["end_outages"], *zip(*ended, strict=True))
    return {row["device_no"]: each[2] for row, each in zip(rows, ended, strict=True)}


def _first_after(subject: Subject, heard_at: datetime) -> First | None:
    """Return the heartbeat with which the device was heard again, unless it had waited in a queue."""
    content = next((each.content for each in subject.noted if each.content.heard_at == heard_at), subject.content)
    habit = _habit(subject, timedelta(0))
    if content.received_at < heard_at or state.is_late(content, habit, subject.thresholds):
        return None
    return First(content.heard_at, content.ts, content.uptime_s)


def _habit(subject: Subject, default_interval: timedelta) -> Habits:
    if subject.habit is not None or subject.state is None:
        return subject.habit or Habits(default_interval, timedelta(0))
    return state.known_habits(subject.state, default_interval)


async def open_outages(record: Record, flips: Sequence[Flip]) -> Mapping[int, str]:
    """Record that devices have become silent, with a first guess of the cause. Return the guesses."""
    opened = []
    for flip in flips:
        if flip.kind == "offline":
            content = record.subjects[flip.device_no].content
            last = Last(content.heard_at, content.ts, content.battery_pct, content.plugged)
            evidence = {"last_ts": last.ts, "battery_pct": last.battery_pct, "plugged": last.plugged}
            opened.append((flip.device_no, flip.since, causes.first_guess(last), _json(evidence)))
    if opened:
        await record.conn.execute(_Q["open_outages"], *zip(*opened, strict=True))
    return {each[0]: each[2] for each in opened}


def last_of(evidence: str, since: datetime) -> Last:
    """Return the last heartbeat before an outage, from the evidence that was recorded when it began."""
    known = orjson.loads(evidence)
    return Last(since, datetime.fromisoformat(known["last_ts"]), known["battery_pct"], known["plugged"])


# ---- incidents ------------------------------------------------------------------------------------------------------


async def leave(record: Record, ended: Sequence[tuple[int, str]]) -> None:
    """Take devices whose fault has ended out of their incidents; resolve incidents that have no more devices."""
    if not ended:
        return
    rows = await record.conn.fetch(_Q["leave"], *zip(*ended, strict=True), record.now)
    left = [_incident(row) for row in rows]
    resolved = [one.incident_id for one in left if one.members == 0]
    if resolved:
        await resolve(record, resolved)
    if staying := [one for one in left if one.members > 0]:
        await _set_mostly_back(record, staying)


async def resolve(record: Record, numbers: Sequence[int], evidence: Mapping[str, Any] = {}) -> None:
    """Resolve incidents."""
    await record.conn.execute(_Q["resolve"], numbers, record.now, _json(evidence))
    record.changed_incidents += numbers


async def _set_mostly_back(record: Record, opened: Sequence[Incident]) -> None:
    flags = [(one.incident_id, incidents.is_mostly_back(one)) for one in opened]
    await record.conn.execute(_Q["set_mostly_back"], *zip(*flags, strict=True), record.now)


async def add_faults(record: Record, faults: Sequence[Fault]) -> tuple[IncidentOf, Mapping[int, str]]:
    """Open, widen or join incidents for new faults. Return the incident of each fault, and the causes that are assumed
    because a whole site is silent, by device."""
    incident_of: IncidentOf = {}
    assumed: dict[int, str] = {}
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    for kind, of_kind in sorted(by_kind.items()):
        presence = record.presence or Presence(record.now, None)
        affected = await affected_by(record.conn, of_kind, record.rules, presence, record.counts)
        sites = sorted({fault.site for fault in of_kind if fault.site is not None})
        rows = await record.conn.fetch(_Q["open_incidents"], kind, sites, affected.is_fleet())
        decisions = incidents.combine(of_kind, affected, [_incident(row) for row in rows])
        members = await _carry_out(record, decisions)
        incident_of |= {(each.device_no, kind): each.incident_id for each in members}
        if kind == "offline":
            assumed |= {each.device_no: causes.SITE for each in members if each.scope == incidents.SITE}
            linked = [(each.incident_id, each.device_no, assumed.get(each.device_no)) for each in members]
            await record.conn.execute(_Q["link_outages"], *zip(*linked, strict=True))
        if kind == "flapping":
            for each in members:
                await _replace(record, each.incident_id, [each.device_no])
    return incident_of, assumed


class _Member(NamedTuple):
    device_no: int
    incident_id: int
    scope: str


async def _carry_out(
    record: Record, decisions: Sequence[Open | Join], continues: int | None = None
) -> Sequence[_Member]:
    """Open, widen or join incidents, by one statement for all of them where there may be many. Return the incident of
    each device. `continues`: the incident that the opened ones continue."""
    opens = [each for each in decisions if isinstance(each, Open)]
    new = [each for each in opens if each.widens is None]
    opened = await _open(record, new, continues) if new else {}
    for wider in opens:
        if wider.widens is not None:
            await _widen(record, wider, wider.widens)
    joined = {each.incident_id for each in decisions if isinstance(each, Join)}
    of_device: dict[int, int] = {}
    for each in decisions:
        incident_id = each.incident_id if isinstance(each, Join) else each.widens or opened[_place(each)]
        of_device |= dict.fromkeys((fault.device_no for fault in each.faults), incident_id)
        if incident_id not in joined:
            record.changed_incidents.append(incident_id)
    kind = decisions[0].faults[0].kind
    rows = await record.conn.fetch(_Q["add_members"], list(of_device.values()), list(of_device), kind, record.now)
    present = {row["incident_id"]: _incident(row) for row in rows}
    if joined:
        await _set_mostly_back(record, [present[number] for number in sorted(joined)])
    return [_Member(no, number, present[number].scope) for no, number in of_device.items()]


async def _open(record: Record, new: Sequence[Open], continues: int | None) -> Mapping[tuple[object, ...], int]:
    """Open incidents, and return their numbers by place."""
    values = []
    for each in new:
        first = min(each.faults, key=lambda fault: fault.since)
        device_no = first.device_no if each.scope == incidents.DEVICE else None
        severity = incidents.severity(each.kind, each.scope)
        values.append((each.scope, each.site, device_no, severity, _cause(each), first.since))
    columns = zip(*values, strict=True)
    rows = await record.conn.fetch(_Q["add_incidents"], new[0].kind, *columns, record.now, continues)
    return {(row["scope"], row["site"], row["device_no"]): row["incident_id"] for row in rows}


def _place(opened: Open) -> tuple[object, ...]:
    device_no = opened.faults[0].device_no if opened.scope == incidents.DEVICE else None
    return opened.scope, opened.site, device_no


async def _widen(record: Record, decision: Open, incident_id: int) -> None:
    severity = incidents.severity(decision.kind, decision.scope)
    await record.conn.execute(
        _Q["widen_incident"], incident_id, decision.scope, decision.site, severity, _cause(decision), record.now
    )
    if decision.absorbs:
        await record.conn.execute(_Q["absorb_incidents"], incident_id, decision.absorbs, record.now)


def _cause(opened: Open) -> str | None:
    """Return the cause that is assumed when an incident is opened or widened."""
    if opened.scope == incidents.FLEET:
        return causes.UNKNOWN
    if opened.scope == incidents.SITE and opened.kind == "offline":
        return causes.SITE
    return min(opened.faults, key=lambda fault: fault.since).cause


async def _replace(record: Record, incident_id: int, members: Sequence[int]) -> None:
    """Let an incident about flapping replace the other incidents of its device, so that only one message is sent."""
    rows = await record.conn.fetch(_Q["memberships"], members)
    of_device = [r["incident_id"] for r in rows if r["scope"] == incidents.DEVICE and r["kind"] in incidents.COMBINED]
    if of_device:
        await record.conn.execute(_Q["replace_incidents"], incident_id, of_device, record.now)


async def split(record: Record) -> None:
    """Resolve the incidents over half of whose devices have been back for long enough. The others go on as incidents of
    their own, which the resolved incident names."""
    waited = record.now - causes.settles_after(record.rules.interval)
    for row in await record.conn.fetch(_Q["to_split"], waited):
        rest = await record.conn.fetch(_Q["rest"], row["incident_id"])
        kind = row["kind"]
        numbers = [(each["device_no"], kind) for each in rest]
        await record.conn.fetch(_Q["leave"], *zip(*numbers, strict=True), record.now)
        named = [each["device_id"] for each in rest[:MAX_NAMED]]
        await resolve(record, [row["incident_id"]], {"remaining": len(rest), "remaining_devices": named})
        faults = [Fault(each["device_no"], each["site"], kind, each["since"], each["cause"]) for each in rest]
        opens = [Open(kind, incidents.DEVICE, fault.site, [fault]) for fault in faults]
        members = await _carry_out(record, opens, row["incident_id"])
        if kind == "offline":
            linked = [(each.incident_id, each.device_no, None) for each in members]
            await record.conn.execute(_Q["link_outages"], *zip(*linked, strict=True))


async def tidy(record: Record) -> None:
    """Do what no change of a device causes: split incidents that are mostly over, and take revoked devices out of
    their incidents, which then end without a message."""
    await split(record)
    await _record_shared_tokens(record)
    revoked = [(row["device_no"], row["kind"]) for row in await record.conn.fetch(_Q["revoked_members"])]
    if revoked:
        await record.conn.execute(_Q["quiet_incidents"], *zip(*revoked, strict=True))
        await leave(record, revoked)


async def _record_shared_tokens(record: Record) -> None:
    """Open and resolve the incidents of tokens that two kiosks share."""
    rows = {row["device_no"]: row for row in await record.conn.fetch(_Q["shared_tokens"], record.now - SHARED_WITHIN)}
    known = {row["device_no"] for row in await record.conn.fetch(_Q["members_of_kind"], "token_shared")}
    await leave(record, [(no, "token_shared") for no in sorted(known - rows.keys())])
    new = [row for no, row in rows.items() if no not in known]
    faults = [Fault(row["device_no"], row["site"], "token_shared", row["since"]) for row in new]
    opened, _ = await add_faults(record, faults)
    events = [
        (row["since"], row["device_no"], row["site"], "token_shared", None,
         _json({"kiosks": orjson.loads(row["evidence"])}), opened[row["device_no"], "token_shared"])
        for row in new
    ]  # fmt: skip
    if events:
        await record.conn.execute(_Q["add_events"], record.now, *zip(*events, strict=True))
        record.events += len(events)


# ---- events ---------------------------------------------------------------------------------------------------------


async def add_events(
    record: Record, flips: Iterable[Flip], cause_of: Mapping[tuple[int, str], str],
    incident_of: Mapping[tuple[int, str], int],
) -> None:  # fmt: skip
    """Add an event for each change."""
    rows = []
    for flip in flips:
        subject, key = record.subjects[flip.device_no], (flip.device_no, flip.kind)
        incident_id = incident_of.get(key, subject.incidents.get(ENDS.get(flip.kind, flip.kind)))
        evidence = flip.evidence if subject.hours.is_open(record.now) else {**flip.evidence, "closed": True}
        rows.append(
            (flip.since, flip.device_no, subject.site, flip.kind, cause_of.get(key), _json(evidence), incident_id)
        )
    if rows:
        await record.conn.execute(_Q["add_events"], record.now, *zip(*rows, strict=True))
        record.events += len(rows)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _incident(row: Any) -> Incident:
    return Incident(
        row["incident_id"], row["kind"], row["scope"], row["site"], row["device_no"], row["members"], row["devices"]
    )


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(value).decode()
