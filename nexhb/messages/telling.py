"""At the end of each round of the watcher: put the messages into the outbox that are due by now.

What is due follows from the incidents and from what each route was told, not from the changes of this round. So nothing
is lost if the daemon is killed between a change and its message; and a message and the record that the route was told
are one transaction.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import orjson

from nexhb import log, metrics
from nexhb.devices.hours import Hours
from nexhb.messages import own_incidents, silences
from nexhb.messages.deciding import ANOTHER_FAULT, Present, Told, due
from nexhb.messages.message import RESOLVED, WIDENED
from nexhb.messages.ping import Ping
from nexhb.messages.routes import Route
from nexhb.messages.silences import InForce
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Connection
from nexhb.readiness import Readiness, Source

_Q = sql.queries("messages")
_log = log.get("notify")

PAGE = 1_000  # incidents in one transaction
READ_EVERY = timedelta(minutes=10)  # all incidents are read, also those for which no message was due
TIDY_EVERY = timedelta(minutes=1)
GIVEN_UP_AFTER = timedelta(hours=24)
KEPT = timedelta(days=90)  # after the creation of a message that was delivered or given up
# If there is no record of what routes were sent about an incident, its end is reported for this time after it.
MAX_MISSED = timedelta(days=1)

ToldRoutes = dict[int, dict[str, Told]]  # incident_id → route → what it was told


@dataclass
class _Outcome:
    """What a page of incidents has to write: messages, and what routes were told."""

    messages: list[tuple[int, str, str, str]] = field(default_factory=list)  # incident_id, route, kind, payload
    told: list[tuple[int, str, str, datetime, bool]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _About:
    """What is known about an incident and a route."""

    now: datetime
    told: Told | None
    before: Told | None  # what the route was told of an incident that this one continues or has absorbed
    is_same_kind: bool  # whether that incident is of the same kind
    tags: Collection[str]  # of the incident's devices
    is_held: bool


class Teller:
    """Puts the messages that are due into the outbox, at the end of each round of the watcher. Remembers the incidents
    for which no message is due until they change, so that a round does not compare thousands of incidents with every
    route."""

    def __init__(self, routes: Sequence[Route], readiness: Readiness, ping: Ping | None = None) -> None:
        self._routes = routes
        self._readiness = readiness
        self._ping = ping
        self._tidied_at: datetime | None = None
        self._read_at: datetime | None = None  # when every incident was last looked at
        self._settled: dict[int, tuple[tuple[Any, ...], datetime | None]] = {}  # the row, and when to look again

    def forget(self) -> None:
        """Look at every incident again: the database was replaced."""
        self._settled.clear()

    async def __call__(self, conn: Connection, now: datetime) -> None:
        """Put the messages that are due into the outbox. `conn` holds the watcher's lock."""
        await own_incidents.note(conn, now, self._readiness.reason(Source.DISK))
        await self.tell(conn, now)
        await self.tidy(conn, now)
        if self._ping is not None:
            self._ping.send()

    async def tell(self, conn: Connection, now: datetime) -> int:
        """Put the messages that are due into the outbox. Return their number."""
        if self._read_at is None or not self._read_at <= now < self._read_at + READ_EVERY:
            self._settled.clear()
            self._read_at = now
        rows = {row["incident_id"]: tuple(row) for row in await conn.fetch(_Q["incidents_now"], now - MAX_MISSED)}
        self._settled = {number: known for number, known in self._settled.items() if rows.get(number) == known[0]}
        due = [number for number in rows if not self._is_settled(number, now)]
        if not due:
            return 0
        silenced = await silences.in_force(conn, now)
        told = 0
        for start in range(0, len(due), PAGE):
            await asyncio.sleep(0)  # heartbeats that have arrived are handled first
            page = due[start : start + PAGE]
            async with conn.transaction():
                outcome, look_again = await self._page(conn, page, now, silenced)
            told += len(outcome.messages)
            self._settled |= {number: (rows[number], at) for number, at in look_again.items()}
        return told

    async def tidy(self, conn: Connection, now: datetime) -> None:
        """Once a minute, give up messages that are too old, also those of routes that no longer exist, and delete old
        ones."""
        if self._tidied_at is not None and abs(now - self._tidied_at) < TIDY_EVERY:
            return
        for row in await conn.fetch(_Q["give_up"], now, now - GIVEN_UP_AFTER):
            metrics.notifications.labels(route=row["route"], result="given_up").inc()
            _log.error("notify.given_up", route=row["route"], id=row["id"], error=row["last_error"])
        await conn.execute(_Q["prune"], now - KEPT)
        self._tidied_at = now

    def _is_settled(self, number: int, now: datetime) -> bool:
        _, look_again = self._settled.get(number, ((), now))
        return look_again is None or look_again > now

    async def _page(
        self, conn: Connection, numbers: Sequence[int], now: datetime, silenced: InForce
    ) -> tuple[_Outcome, dict[int, datetime | None]]:
        """Return what was written, and when to look again at incidents that are not held by a silence or hours."""
        rows = await conn.fetch(_Q["incidents_to_tell"], numbers)
        told, ended = await _told(conn, numbers)
        inherited = await _inherited(conn, numbers)
        tags = await _tags(conn, rows, self._routes)
        of_several = [row["incident_id"] for row in rows if row["scope"] in ("site", "fleet")]
        whole = await silences.whole(conn, of_several, silenced)
        outcome, look_again = _Outcome(), dict[int, datetime | None]()
        quiet = {
            route.name: route.quiet.next_change(now) for route in self._routes if route.quiet and route.is_quiet(now)
        }
        for row in rows:
            number = row["incident_id"]
            if row["untold"]:
                outcome.told += [(number, name, t.scope, t.reminded_at, True) for name, t in told[number].items()]
                continue
            held = number in whole or _is_held(row, now, silenced)
            times = [at for at in quiet.values() if at is not None]
            for route in self._routes:
                if (number, route.name) not in ended:
                    before, is_same_kind = inherited.get((number, route.name), (None, False))
                    about = _About(
                        now, told[number].get(route.name), before, is_same_kind, tags.get(number, row["tags"]),
                        held or route.name in quiet,
                    )  # fmt: skip
                    times += filter(None, [_decide(row, route, about, outcome)])
            _end_unknown(row, told[number], {route.name for route in self._routes}, outcome)
            if not held:
                look_again[number] = min(times, default=None)
        await _write(conn, outcome, now)
        return outcome, look_again


async def _write(conn: Connection, outcome: _Outcome, now: datetime) -> None:
    if outcome.told:
        await conn.execute(_Q["note_told"], *zip(*outcome.told, strict=True), now)
    if outcome.messages:
        await conn.execute(_Q["add_notifications"], *zip(*outcome.messages, strict=True), now)
        await conn.execute(_Q["wake"])


def _decide(row: Any, route: Route, about: _About, outcome: _Outcome) -> datetime | None:
    """Decide what is due about an incident on a route. Return when a reminder will be due."""
    incident_id, told = row["incident_id"], about.told
    matches = route.matches(
        kind=row["kind"], scope=row["scope"], severity=row["severity"], site=row["site"], tags=about.tags
    )
    inherited = None
    if told is None and about.before is not None:
        # The route was told of this fault already, as another incident: it is told of its end, too.
        is_known = about.is_same_kind or not matches
        inherited = told = about.before if is_known else Told(ANOTHER_FAULT, about.before.reminded_at)
    present = Present(row["scope"], row["resolved_at"] is None, row["acked_at"] is not None)
    kind = due(present, told, about.now, matches=matches, held=about.is_held, reminder=route.reminder)
    if kind is not None:
        reminded_at = told.reminded_at if kind == RESOLVED and told is not None else about.now
        outcome.told.append((incident_id, route.name, row["scope"], reminded_at, kind == RESOLVED))
        outcome.messages.append((incident_id, route.name, kind, _payload(row, told if kind == WIDENED else None)))
        told = Told(row["scope"], reminded_at)
    elif inherited is not None:
        outcome.told.append((incident_id, route.name, inherited.scope, inherited.reminded_at, False))
    if told is None or route.reminder is None or present.is_acked or not present.is_open:
        return None
    return told.reminded_at + route.reminder


def _end_unknown(row: Any, told: Mapping[str, Told], known: Collection[str], outcome: _Outcome) -> None:
    """Forget routes that were told of the incident, but are no longer in the settings."""
    if row["resolved_at"] is not None:
        outcome.told += [
            (row["incident_id"], name, t.scope, t.reminded_at, True) for name, t in told.items() if name not in known
        ]


def _is_held(row: Any, now: datetime, silenced: InForce) -> bool:
    if row["scope"] == "ours":
        return False
    if silenced.of(row["device_id"], row["site"], row["tags"]) is not None:
        return True
    return row["hours"] is not None and not Hours.stored(row["hours"], row["zone"]).is_open(now)


def _payload(row: Any, told: Told | None) -> str:
    """Return the data of a message."""
    keys = (
        "incident_id", "kind", "scope", "severity", "site", "site_name", "device_id", "device_name", "devices",
        "members", "cause", "since", "opened_at", "resolved_at",
    )  # fmt: skip
    evidence = orjson.loads(row["evidence"])
    data = {key: row[key] for key in keys}
    data |= {key: evidence[key] for key in ("detail", "remaining", "remaining_devices") if key in evidence}
    if told is not None:
        data["previous_scope"] = told.scope
    return orjson.dumps(data, option=orjson.OPT_UTC_Z).decode()


# ---- reading --------------------------------------------------------------------------------------------------------


async def _told(conn: Connection, numbers: Sequence[int]) -> tuple[ToldRoutes, set[tuple[int, str]]]:
    """Return what routes were told of these incidents, and which of them were told of their end."""
    told: ToldRoutes = defaultdict(dict)
    ended = set()
    for row in await conn.fetch(_Q["told"], numbers):
        if row["resolved_at"] is None:
            told[row["incident_id"]][row["route"]] = Told(row["scope"], row["reminded_at"])
        else:
            ended.add((row["incident_id"], row["route"]))
    return told, ended


async def _inherited(conn: Connection, numbers: Sequence[int]) -> Mapping[tuple[int, str], tuple[Told, bool]]:
    """Return what routes were told of the incidents that these continue or have absorbed, and whether those are of the
    same kind."""
    inherited: dict[tuple[int, str], tuple[Told, bool]] = {}
    for row in await conn.fetch(_Q["told_before"], numbers):
        told = Told(row["scope"], row["reminded_at"])
        inherited.setdefault((row["incident_id"], row["route"]), (told, row["kind"] == row["earlier_kind"]))
    return inherited


async def _tags(conn: Connection, rows: Sequence[Any], routes: Sequence[Route]) -> Mapping[int, Collection[str]]:
    """Return the tags of incidents of a site: those of its devices that a route asks for."""
    asked = sorted({tag for route in routes for tag in route.tags})
    numbers = [row["incident_id"] for row in rows if row["scope"] == "site"]
    if not asked or not numbers:
        return {}
    return {row["incident_id"]: row["tags"] for row in await conn.fetch(_Q["tags_of"], numbers, asked)}


async def acknowledge(conn: AnyConnection, incident_id: int, now: datetime, by: str) -> dict[str, Any] | None:
    """Acknowledge an incident, which stops its reminders. Return it; None if there is no such incident."""
    row = await conn.fetchrow(_Q["acknowledge"], incident_id, now, by)
    return None if row is None else dict(row)
