"""Make the rows of device_days: from the heartbeats of a day, what each device did on it.

PostgreSQL reduces the heartbeats to a few edges per device, in one pass over the day; nexhb/watching/uptime.py decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from math import inf
from typing import Any, NamedTuple

from nexhb.partitions import midnight, quoted
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Connection
from nexhb.watching import months, places
from nexhb.watching.places import Place
from nexhb.watching.uptime import Beat, Circumstances, DayParts, Heartbeats, Range, Stretch, day_parts

_Q = sql.queries("device_days")

DAY = timedelta(days=1)
CHUNK_DEVICES = 10_000  # in one statement and one transaction: 14 million heartbeats, 0.9 GB of temporary files
PREFETCH_EDGES = 500  # after this many edges (5 ms), the event loop is free for heartbeats
PAUSE_DEVICES = 200
MARGIN = timedelta(minutes=15)  # heartbeats before the day that are read with it, in addition to the offline threshold
# How far before and after the day the nearest heartbeats are searched for, step by step. A device whose heartbeat was
# found in one step is left out of the next. After the last step, each step is a day.
STEPS = (timedelta(minutes=10), timedelta(hours=1), timedelta(hours=4), timedelta(hours=10), DAY)
COLUMNS = (
    "device_no", "day", "place_no", "closed_tenths", "ours_tenths", "heard_tenths", "replayed_tenths", "off_tenths",
    "unknown_tenths", "unity_tenths", "battery_least", "flaps", "reboots", "is_open",
)  # fmt: skip


@dataclass(frozen=True)
class UptimeRules:
    """The settings that determine uptimes."""

    interval_s: float = 60
    offline_after_s: float = 600
    retention_days: int = 731


@dataclass(frozen=True, slots=True)
class Device:
    """A device, and where it was on the day."""

    device_no: int
    created_at: datetime
    revoked_at: datetime | None
    place: Place


class DayTable(NamedTuple):
    """A UTC day, and the table that contains its heartbeats."""

    day: date
    table: str


def no_checkpoint(_point: str) -> None:
    """Do nothing at a checkpoint."""


# ---- which days are due ---------------------------------------------------------------------------------------------


async def due(conn: Connection, days: Sequence[date]) -> dict[date, str]:
    """Return which of these days, which are over and have a table, must be made, each with the reason."""
    reasons = {
        row["day"]: "not made yet" if row["is_new"] else "heartbeats arrived since it was made"
        for row in await conn.fetch(_Q["due"], days)
    }
    for day, devices in (await _ended_silences(conn, days)).items():
        reasons.setdefault(day, f"{len(devices)} silences have ended since it was made")
    return reasons


async def _ended_silences(conn: Connection, days: Sequence[date]) -> dict[date, list[int]]:
    devices = [row["device_no"] for row in await conn.fetch(_Q["open_devices"], days)]
    if not devices:
        return {}
    heard = await conn.fetch(_Q["heard"], devices)
    columns = [row["device_no"] for row in heard], [row["heard_at"] for row in heard]
    return {row["day"]: row["devices"] for row in await conn.fetch(_Q["ended"], days, *columns)}


# ---- make a day -----------------------------------------------------------------------------------------------------


async def make_due(
    conn: Connection,
    source: DayTable,
    rules: UptimeRules,
    now: datetime,
    checkpoint: Callable[[str], None] = no_checkpoint,
) -> int:
    """Make the day, or only its devices whose silence has ended; return the number of rows. Repeatable: a run that is
    killed leaves the day due."""
    day = source.day
    if await conn.fetch(_Q["due"], [day]):
        written = await conn.fetchval(_Q["written"], day)  # before the rows are read, so that later rows make it due
        rows = await _make(conn, source, rules, now, checkpoint=checkpoint)
        await conn.execute(_Q["made"], day, written, now)
        return rows
    devices = (await _ended_silences(conn, [day])).get(day)
    return await _make(conn, source, rules, now, devices, checkpoint=checkpoint) if devices else 0


async def _make(
    conn: Connection,
    source: DayTable,
    rules: UptimeRules,
    now: datetime,
    only: list[int] | None = None,
    *,
    checkpoint: Callable[[str], None],
) -> int:
    day = source.day
    if day < now.date() - timedelta(days=rules.retention_days):
        return 0
    await months.ensure(conn, day)
    after, count = 0, 0
    while chunk := await conn.fetch(_Q["devices"], after, CHUNK_DEVICES, midnight(day), only):
        devices = await placed(conn, day, chunk)
        parts = await compute(conn, source, devices, rules, now)
        first, after = after + 1, devices[-1].device_no
        async with conn.transaction():
            numbers = await places.numbers(conn, (device.place for device in devices))
            await conn.execute(_Q["delete_days"], day, first, after, only)
            rows = [(d.device_no, day, numbers[d.place], *parts[d.device_no]) for d in devices if d.device_no in parts]
            await conn.copy_records_to_table(months.PARENT, records=rows, columns=COLUMNS)
        count += len(rows)
        checkpoint("uptime chunk")
    return count


async def placed(conn: AnyConnection, day: date, rows: Iterable[Any]) -> list[Device]:
    """Return the devices with their sites and opening hours: those of the time when the day was first made, otherwise
    the present ones."""
    rows = list(rows)
    kept = await places.of_day(conn, day, [row["device_no"] for row in rows])
    present = await places.current(conn, {row["site"] for row in rows})
    return [
        Device(
            row["device_no"], row["created_at"], row["revoked_at"],
            kept.get(row["device_no"]) or present.get(row["site"], Place(row["site"])),
        )
        for row in rows
    ]  # fmt: skip


# ---- compute the parts ----------------------------------------------------------------------------------------------


async def compute(
    conn: AnyConnection, source: DayTable, devices: Sequence[Device], rules: UptimeRules, now: datetime
) -> dict[int, DayParts]:
    """Return the parts of the day by device_no, without those devices that did not exist on it."""
    start, end = midnight(source.day), midnight(source.day) + DAY
    earliest = start - timedelta(seconds=rules.offline_after_s) - MARGIN
    numbers = [device.device_no for device in devices]
    following = await _following(conn, numbers, end, now) if end <= now else {}
    previous = await _previous(conn, devices, earliest, start)
    circumstances = await _Calendar.read(conn, start, rules, now)
    remaining = {device.device_no: device for device in devices}
    parts: dict[int, DayParts] = {}

    def judge(heartbeats: Heartbeats, device: Device) -> None:
        number = device.device_no
        complete = replace(heartbeats, previous_at=previous.get(number, -inf), following=following.get(number))
        if (of_device := day_parts(complete, circumstances.of(device))) is not None:
            parts[number] = of_device

    async with conn.transaction(readonly=True):
        query = _Q["edges"].replace("$table", quoted(source.table))
        limits = float(rules.interval_s), float(rules.offline_after_s)
        edges = conn.cursor(query, numbers, start, end, earliest, *limits, prefetch=PREFETCH_EDGES)
        async for device_no, rows in _grouped(edges):
            judge(_from_edges(rows), remaining.pop(device_no))
    for index, device in enumerate(remaining.values()):
        if index % PAUSE_DEVICES == 0:
            await asyncio.sleep(0)
        judge(Heartbeats(rules.interval_s, 0.0), device)
    return parts


async def _grouped(edges: AsyncIterable[Any]) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield the rows of each device, which follow each other. Only one device's rows are in memory: each heartbeat of a
    defective agent may be an edge."""
    rows: list[Any] = []
    async for row in edges:
        if rows and row["device_no"] != rows[0]["device_no"]:
            yield rows[0]["device_no"], rows
            rows = []
        rows.append(row)
    if rows:
        yield rows[0]["device_no"], rows


@dataclass(slots=True)
class _Calendar:
    """The blackouts, and the opening hours of each place, around a day."""

    base: Circumstances
    start: datetime
    by_place: dict[Place, Circumstances] = field(default_factory=dict)

    @classmethod
    async def read(cls, conn: AnyConnection, start: datetime, rules: UptimeRules, now: datetime) -> _Calendar:
        blackouts = _merged(await conn.fetch(_Q["blackouts"], start - DAY, start + 2 * DAY))
        return cls(Circumstances(start.timestamp(), now.timestamp(), rules.offline_after_s, (), blackouts), start)

    def of(self, device: Device) -> Circumstances:
        """Return the circumstances of a device."""
        if (at_place := self.by_place.get(device.place)) is None:
            opened = device.place.open_ranges(self.start - DAY, self.start + 2 * DAY)
            at_place = self.by_place[device.place] = replace(self.base, open=opened)
        revoked = inf if device.revoked_at is None else device.revoked_at.timestamp()
        return replace(at_place, created=device.created_at.timestamp(), revoked=revoked)


def _merged(rows: Iterable[Any]) -> list[Range]:
    """Return the blackouts without overlaps."""
    merged: list[Range] = []
    for began, ended in rows:
        if merged and began <= merged[-1].end:
            merged[-1] = Range(merged[-1].start, max(merged[-1].end, ended))
        else:
            merged.append(Range(began, ended))
    return merged


def _from_edges(rows: Sequence[Any]) -> Heartbeats:
    """Return what the rows of the query `edges` of one device show."""
    stretches: list[Stretch] = []
    first, last = rows[0], rows[-1]
    for row in rows[1:]:
        if row["begins"]:
            stretches.append(_stretch(first, row["at_before"], row["received_before"]))
            first = row
    stretches.append(_stretch(first, last["at"], last["received"]))
    return Heartbeats(first["interval_s"], first["skew_s"], stretches, battery_least=first["battery_least"])


def _stretch(first: Any, last_at: float, last_received: float) -> Stretch:
    return Stretch(
        first["at"], last_at, first["received"], last_received, first["late"], first["uptime_s"], first["unity"]
    )


def _distances(limit: timedelta) -> Iterator[timedelta]:
    """Yield how far to look, step by step, up to `limit`."""
    if limit <= timedelta(0):
        return
    yield from (step for step in STEPS if step < limit)
    yield from (n * DAY for n in range(2, -(-limit // DAY)))
    yield limit


async def _following(conn: AnyConnection, devices: Sequence[int], end: datetime, now: datetime) -> dict[int, Beat]:
    """Return the first heartbeat of each device after the day; a device whose silence lasts has none."""
    following: dict[int, Beat] = {}
    remaining, since = set(devices), end
    for distance in _distances(now + DAY - end):  # a device's clock may be ahead by up to a day
        for row in await conn.fetch(_Q["first_heartbeats"], list(remaining), since, end + distance):
            following[row["device_no"]] = Beat(row["at"], row["received"], row["uptime_s"])
            remaining.discard(row["device_no"])
        since = end + distance
        if not remaining:
            break
    return following


async def _previous(
    conn: AnyConnection, devices: Sequence[Device], earliest: datetime, start: datetime
) -> dict[int, float | None]:
    """Return the last heartbeat before `earliest` of each device that has none between `earliest` and the day; None if
    the device was never heard before."""
    remaining = {device.device_no: device.created_at for device in devices}
    for row in await conn.fetch(_Q["last_heartbeats"], list(remaining), earliest, start):
        del remaining[row["device_no"]]
    if not remaining:
        return {}
    oldest = await conn.fetchval(_Q["oldest"]) or earliest
    previous: dict[int, float | None] = {}
    until = earliest
    for distance in _distances(earliest - oldest):
        for row in await conn.fetch(_Q["last_heartbeats"], list(remaining), earliest - distance, until):
            previous[row["device_no"]] = row["at"]
            del remaining[row["device_no"]]
        until = earliest - distance
        if not remaining:
            break
    return previous | {number: None if created >= oldest else -inf for number, created in remaining.items()}
