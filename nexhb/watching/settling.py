"""Settle the causes of outages once the agent has had the time to send its queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching import causes
from nexhb.watching.causes import First, Gap
from nexhb.watching.judging import Rules
from nexhb.watching.recording import last_of

_Q = sql.queries("watching")

GROUP = 200
MAX_WAIT = timedelta(days=1)  # after its return, a device that sends no live heartbeat leaves its cause open this long


@dataclass(frozen=True, slots=True)
class _Outage:
    outage_no: int
    device_no: int
    since: datetime
    until: datetime
    cause: str
    evidence: str
    incident_id: int | None
    interval: timedelta
    late_after: timedelta  # a heartbeat that took longer to arrive is not live


async def settle(conn: Connection, rules: Rules, presence: Presence | None, now: datetime) -> int:
    """Settle the outages that are due. Return their number."""
    settled = 0
    while True:
        async with conn.transaction():
            rows = await conn.fetch(_Q["outages_to_settle"], now, GROUP)
            if rows:
                await _settle_group(conn, rows, rules, presence, now)
        settled += len(rows)
        if len(rows) < GROUP:
            return settled


async def _settle_group(
    conn: Connection, rows: Sequence[Any], rules: Rules, presence: Presence | None, now: datetime
) -> None:
    numbers = sorted({row["device_no"] for row in rows})
    states = {row["device_no"]: row for row in await conn.fetch(_Q["hold_states"], numbers)}
    devices = {row["device_no"]: row for row in await conn.fetch(_Q["devices"], numbers)}
    outages = [_outage(row, states.get(row["device_no"]), devices[row["device_no"]]["tags"], rules) for row in rows]
    lasts = [last_of(each.evidence, each.since) for each in outages]
    gaps = await conn.fetch(
        _Q["gaps"], [each.device_no for each in outages], [last.ts for last in lasts],
        [each.until for each in outages], [each.late_after.total_seconds() for each in outages],
        min(last.ts for last in lasts), now + timedelta(days=1),
    )  # fmt: skip
    found = {(row["device_no"], row["until"]): row for row in gaps}
    values = []
    for outage, last in zip(outages, lasts, strict=True):
        row = found[outage.device_no, outage.until]
        values.append((outage.outage_no, *_settled(outage, last, row, presence, now)))
    await conn.execute(_Q["settle_outages"], *zip(*values, strict=True), now)
    incident_ids = sorted({each.incident_id for each in outages if each.incident_id is not None})
    await conn.execute(_Q["settle_incidents"], incident_ids, now)


def _settled(
    outage: _Outage, last: causes.Last, row: Any, presence: Presence | None, now: datetime
) -> tuple[str, str, datetime | None]:
    """Return the cause, its evidence (JSON), and when to try again; None if the cause is settled."""
    if row["ts"] is None:  # only heartbeats from the queue so far
        if now - outage.until < MAX_WAIT:
            return outage.cause, "{}", now + causes.settles_after(outage.interval)
        return outage.cause, '{"live": false}', None
    live_until = row["received_at"] + causes.settles_after(outage.interval)
    if live_until > now:
        return outage.cause, "{}", live_until
    first = First(row["received_at"], row["ts"], row["uptime_s"])
    gap = Gap(last, first, outage.interval, row["replayed"], presence.blackouts if presence else ())
    cause, evidence = causes.judge(gap)
    return cause, orjson.dumps(evidence).decode(), None


def _outage(row: Any, known: Any, tags: Sequence[str], rules: Rules) -> _Outage:
    interval = timedelta(seconds=known["interval_s"]) if known and known["interval_s"] else rules.interval
    skew = timedelta(seconds=known["skew_s"] or 0) if known else timedelta(0)
    return _Outage(
        row["outage_no"], row["device_no"], row["since"], row["until"], row["cause"], row["evidence"],
        row["incident_id"], interval, skew + rules.of(tags).offline_after,
    )  # fmt: skip
