"""A round of the watcher: read which devices may have changed, judge them, and record the result in one transaction for
each group of devices. A round that is killed is continued by the next one: nothing is recorded twice."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from nexhb import log, metrics
from nexhb.devices.hours import Hours
from nexhb.devices.presence import Presence
from nexhb.errors import StateChanged
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.errors import Kind, classify
from nexhb.watching import recording, state
from nexhb.watching.affected import FleetCounts
from nexhb.watching.judging import Judgement, Noted, Rules, Subject, judge
from nexhb.watching.recording import Record
from nexhb.watching.state import Change, Content, DeviceState, Habits

_Q = sql.queries("watching")
_log = log.get("watch")

ALWAYS_OPEN = Hours(None, "UTC")
GROUP = 500  # devices in one transaction: it locks their states for some 50 ms
PAUSE_AFTER = 50  # devices judged while heartbeats wait: some 10 ms
BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)  # before any heartbeat
HABIT_DAYS = timedelta(days=3)  # how far back the last heartbeats of a device are read


@dataclass(frozen=True)
class Round:
    """One round. Without `presence`, silence is not judged."""

    conn: Connection
    rules: Rules
    presence: Presence | None
    now: datetime
    counts: FleetCounts = field(default_factory=dict)

    async def judge_changes(self) -> None:
        """Judge the devices whose changes the writer has noted."""
        while True:
            rows = await self.conn.fetch(_Q["changes"], GROUP)
            noted: dict[int, list[Noted]] = defaultdict(list)
            for row in rows:
                noted[row["device_no"]].append(Noted(row["change_no"], Change(row["changes"]), content_of(row)))
            if noted:
                await self._judge_group(noted, complete=len(rows) < GROUP)
            if len(rows) < GROUP:
                return

    async def judge_due(self) -> None:
        """Judge the devices that earlier rounds wanted to look at again."""
        position = (BEGINNING, 0)
        while rows := await self.conn.fetch(_Q["due"], self.now, *position, GROUP):
            await self._judge_group({row["device_no"]: () for row in rows}, complete=True)
            position = (rows[-1]["due_at"], rows[-1]["device_no"])
            if len(rows) < GROUP:
                return

    async def judge_silent(self, since: datetime | None) -> datetime:
        """Judge the devices that were last heard after `since` and are silent (None: all silent devices). Return the
        `since` of the next round."""
        presence = self.presence or Presence(self.now, None)
        silent = presence.silent_for(self.rules.shortest_offline_after)
        position = (since or BEGINNING, 0)
        while rows := await self.conn.fetch(_Q["silent"], silent.before, silent.multirange, *position, GROUP):
            await self._judge_group({row["device_no"]: () for row in rows}, complete=True)
            position = (rows[-1]["heard_at"], rows[-1]["device_no"])
            if len(rows) < GROUP:
                break
        # Devices that were last heard in a span of `except_in` do not count as silent yet: a later round has to look at
        # them.
        return min([silent.before, *(span.start for span in silent.except_in)])

    async def tidy(self) -> None:
        """Do what no change of a device causes."""
        async with self.conn.transaction():
            record = Record(self.conn, self.rules, self.presence, self.now, counts=self.counts)
            await recording.tidy(record)
            await _announce(record)

    async def _judge_group(self, noted: Mapping[int, Sequence[Noted]], *, complete: bool) -> None:
        """Judge a group of devices. If that fails because of one of them, judge the others, and leave that one out: it
        must not blind the watcher to the rest of the fleet."""
        try:
            await self._judge_together(noted, complete=complete)
        except Exception as error:
            if isinstance(error, StateChanged) or classify(error) not in (Kind.BUG, Kind.DATA, Kind.DUPLICATE):
                raise
            numbers = sorted(noted)
            if len(numbers) > 1:
                for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                    await self._judge_group({no: noted[no] for no in half}, complete=complete)
                return
            _log.error("watch.device_not_judged", device_no=numbers[0], exc_info=error)
            metrics.watch_failures.inc()
            await self.conn.execute(_Q["forget_changes"], [each.change_no for each in noted[numbers[0]]])

    async def _judge_together(self, noted: Mapping[int, Sequence[Noted]], *, complete: bool) -> None:
        await asyncio.sleep(0)  # heartbeats that have arrived are handled first
        async with self.conn.transaction():
            revisions, subjects = await self._subjects(noted)
            judgements = {}
            for place, subject in enumerate(subjects):
                if place % PAUSE_AFTER == 0:
                    await asyncio.sleep(0)
                judgement = judge(subject, self.rules, self.presence, self.now, complete=complete)
                judgements[subject.device_no] = judgement
            await write_states(self.conn, revisions, [each.state for each in judgements.values()])
            by_number = {subject.device_no: subject for subject in subjects}
            record = Record(self.conn, self.rules, self.presence, self.now, by_number, self.counts)
            await _record(record, judgements)
            await _announce(record)
            if change_numbers := [each.change_no for changes in noted.values() for each in changes]:
                await self.conn.execute(_Q["forget_changes"], change_numbers)

    async def _subjects(self, noted: Mapping[int, Sequence[Noted]]) -> tuple[Mapping[int, int], list[Subject]]:
        """Read what is known of these devices, and lock their states. Return the revisions of the states, too."""
        numbers = sorted(noted)
        known = _by_number(await self.conn.fetch(_Q["hold_states"], numbers))
        contents = _by_number(await self.conn.fetch(_Q["contents"], numbers))
        devices = _by_number(await self.conn.fetch(_Q["devices"], numbers))
        hours = await hours_of(self.conn, {row["site"] for row in devices.values() if row["site"]})
        incident_of: dict[int, dict[str, int]] = defaultdict(dict)
        for row in await self.conn.fetch(_Q["memberships"], numbers):
            incident_of[row["device_no"]][row["kind"]] = row["incident_id"]
        current = {no: _state(row) for no, row in known.items()}
        habits = await self._habits(contents, devices, current)
        subjects = [
            Subject(
                no,
                devices[no]["site"],
                devices[no]["active"] and contents[no]["status"] == "ok",
                hours.get(devices[no]["site"], ALWAYS_OPEN),
                self.rules.of(devices[no]["tags"]),
                current.get(no),
                content_of(contents[no]),
                noted[no],
                habits.get(no),
                incident_of[no],
            )
            for no in numbers
            if no in devices and no in contents
        ]
        return {no: row["revision"] for no, row in known.items()}, subjects

    async def _habits(
        self, contents: Mapping[int, Any], devices: Mapping[int, Any], current: Mapping[int, DeviceState]
    ) -> Mapping[int, Habits]:
        """Learn the habits of the devices that may be silent, or whose newest heartbeat looks late."""
        known, unsure = {}, []
        for no, row in contents.items():
            thresholds = self.rules.of(devices[no]["tags"]) if no in devices else self.rules.thresholds
            default = Habits(self.rules.interval, timedelta(0))
            known[no] = state.known_habits(current[no], self.rules.interval) if no in current else default
            silence = self.presence.silence(row["heard_at"]) if self.presence else timedelta(0)
            if silence > thresholds.offline_after or state.is_late(content_of(row), known[no], thresholds):
                unsure.append(no)
        return await learned_habits(self.conn, {no: known[no] for no in unsure}, self.now)


async def learned_habits(conn: Connection, known: Mapping[int, Habits], now: datetime) -> Mapping[int, Habits]:
    """Return the habits of these devices, learned from their last heartbeats."""
    if not known:
        return {}
    rows = await conn.fetch(_Q["last_heartbeats"], list(known), now - HABIT_DAYS, now + timedelta(days=1))
    return {row["device_no"]: state.habits(row["ts"], row["received_at"], known[row["device_no"]]) for row in rows}


async def hours_of(conn: Connection, sites: set[str]) -> Mapping[str | None, Hours]:
    """Return the opening hours of these sites."""
    if not sites:
        return {}
    rows = await conn.fetch(_Q["hours"], sorted(sites))
    return {row["site"]: Hours.stored(row["hours"], row["zone"]) for row in rows}


async def _announce(record: Record) -> None:
    if record.events or record.changed_incidents:
        await record.conn.execute(_Q["announce"])


async def _record(record: Record, judgements: Mapping[int, Judgement]) -> None:
    """Record the outages, incidents and events of these judgements."""
    flips = [flip for each in judgements.values() for flip in each.flips]
    faults = [fault for each in judgements.values() for fault in each.faults]
    ended = [(no, kind) for no, each in judgements.items() for kind in each.ended]
    known = await recording.end_outages(record, flips)
    guesses = await recording.open_outages(record, flips)
    # An incident about flapping replaces the other incidents of its device before their faults end: nothing is told of
    # their end, which the flapping makes doubtful.
    flapping = {fault.device_no for fault in faults if fault.kind == "flapping"}
    await recording.leave(record, [each for each in ended if each[0] not in flapping])
    opened, assumed = await recording.add_faults(record, faults)
    await recording.leave(record, [each for each in ended if each[0] in flapping])
    causes = {(no, "online"): cause for no, cause in known.items()}
    causes |= {(no, "offline"): cause for no, cause in {**guesses, **assumed}.items()}
    await recording.add_events(record, flips, causes, opened)


# ---- rows -----------------------------------------------------------------------------------------------------------


async def write_states(conn: Connection, revisions: Mapping[int, int], states: Sequence[DeviceState]) -> None:
    """Write states, of which those with a revision exist already. Raise StateChanged if one was changed meanwhile."""
    new = [each for each in states if each.device_no not in revisions]
    old = [each for each in states if each.device_no in revisions]
    written = await conn.fetch(_Q["insert_states"], *_columns(new)) if new else []
    if old:
        written += await conn.fetch(_Q["update_states"], *_columns(old), [revisions[each.device_no] for each in old])
    if len(written) < len(states):
        raise StateChanged


def _by_number(rows: Sequence[Any]) -> dict[int, Any]:
    return {row["device_no"]: row for row in rows}


def content_of(row: Any) -> Content:
    """Return the content of a row of device_last_status or device_changes."""
    return Content(
        row["heard_at"], row["ts"], row["received_at"], row["clock_wrong"], row["uptime_s"], row["battery_pct"],
        row["plugged"], row["unity_running"], row["agent_version"], row["unity_pkg_version"],
    )  # fmt: skip


def _state(row: Any) -> DeviceState:
    return DeviceState(
        row["device_no"], row["presence"], row["presence_since"], row["unity"], row["unity_since"], row["battery"],
        row["battery_since"], row["clock"], row["clock_since"], row["agent_version"], row["unity_pkg_version"],
        row["interval_s"], row["skew_s"], tuple(row["flips"]), row["flapping_since"], tuple(row["adopted"]),
        row["due_at"],
    )  # fmt: skip


def _columns(states: Sequence[DeviceState]) -> list[tuple[object, ...]]:
    """Return the arguments of insert_states: one sequence for each column. Arrays are written as PostgreSQL's text,
    because an array of arrays must be rectangular."""
    rows = (
        (
            s.device_no, s.presence, s.presence_since, s.unity, s.unity_since, s.battery, s.battery_since, s.clock,
            s.clock_since, s.agent_version, s.unity_pkg_version, s.interval_s, s.skew_s,
            _array([at.isoformat() for at in s.flips]), s.flapping_since, _array(s.adopted), s.due_at,
        )
        for s in states
    )  # fmt: skip
    return list(zip(*rows, strict=True))


def _array(items: Sequence[str]) -> str:
    return "{" + ",".join(f'"{item}"' for item in items) + "}"
