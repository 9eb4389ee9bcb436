"""What operators ask, on pools of its own, so that a heavy read never holds up ingest. Times are arguments.

Two ways to answer: from device_last_status by index, or from the history by window function as the old system did.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy

from nexhb import metrics, sql, taking
from nexhb.db import Connection, Pool
from nexhb.errors import DatabaseUnavailable, UnknownDevice
from nexhb.pgerrors import is_unavailable
from nexhb.presence import Presence
from nexhb.texts import quoted
from nexhb.wire import BUCKET_EPOCH

_Q = sql.queries("reads")
_LEGACY = sql.legacy()

SEEN_WITHIN = timedelta(hours=24)  # a device that was not heard for longer is not listed as "Unity down"
QUEUED_FOR = timedelta(days=8)  # what is received now may have been made so long ago (ingest.accept_past: 7 days)
LOOKS_AHEAD = timedelta(days=1)  # as far as the reconciliation: a device's clock may be ahead by ingest.accept_future
ACQUIRE_TIMEOUT_S = 5.0
_BUCKETS_FROM = datetime.fromtimestamp(BUCKET_EPOCH, UTC)
_LAST_BUCKET = 2**31
# A read from the history: one core of its own and no more; with the usual 4 MB its sort takes twice as long.
LEGACY_SESSION: dict[str, Any] = {"max_parallel_workers_per_gather": "0", "jit": "off", "work_mem": "16MB"}

Row = dict[str, Any]
Conn = Connection | PoolConnectionProxy


# ---- what can be asked both ways ------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a page of a list ends: the last one on it."""

    heard_at: datetime
    device_id: str


_BEFORE_ALL = Place(datetime(1970, 1, 1, tzinfo=UTC), "")
_BEHIND_ALL = Place(datetime(2200, 1, 1, tzinfo=UTC), "")


class Offline(NamedTuple):
    """Who has been silent for longer than that; the longest silent first."""

    silent_for: timedelta
    limit: int
    after: Place | None = None
    name: str = "offline"


class UnityDown(NamedTuple):
    """Where does Unity not run, of those heard within 24 h, and who of them is online; the last heard first."""

    online_within: timedelta
    limit: int
    after: Place | None = None
    name: str = "unity_down"


class OneDevice(NamedTuple):
    """A device and its last status."""

    device_id: str
    online_within: timedelta
    name: str = "device"


Question = Offline | UnityDown | OneDevice


@dataclass(frozen=True)
class Found:
    """How many there are, and as many of them as were asked for: objects with the columns as attributes, of one type
    where the columns are the same, so that answers of both ways compare."""

    count: int
    rows: list[Any]
    following: Place | None = None  # the last of them, where there are more


@dataclass(frozen=True)
class FromStatus:
    """Answers from device_last_status."""

    source = "last_status"

    async def ask(self, conn: Conn, question: Question, known: Presence) -> Found:
        """The answer at `known.now`."""
        if isinstance(question, OneDevice):
            return _one(await conn.fetch(_Q["device"], question.device_id), known, question.online_within)
        if isinstance(question, Offline):
            silent = known.silent(question.silent_for)
            who = (silent.before, silent.multirange)
            count, records = await _first(conn, _Q["offline_all"], _Q["offline"], who, question)
            return _page(question, count, _silent(records, known))
        since = known.now - SEEN_WITHIN
        count, records = await _first(conn, _Q["unity_down_all"], _Q["unity_down"], (since,), question)
        return _page(question, count, _there(records, known, question.online_within))


async def _first(
    conn: Conn, whole: str, cut: str, who: tuple[object, ...], question: Offline | UnityDown
) -> tuple[int, list[asyncpg.Record]]:
    """How many there are of a list, and of those behind its place the first in its order, one more than its limit; both
    of one moment."""
    most = question.limit + 1
    if question.after is None:
        records = await conn.fetch(whole, *who, most)
        if len(records) < most:
            records.sort(key=itemgetter("heard_at", "device_id"), reverse=isinstance(question, UnityDown))
            return len(records), records
    records = await conn.fetch(cut, *who, most, *_place(question))
    return _total(records), records


def _place(question: Offline | UnityDown) -> Place:
    """From where on: nothing is before the longest silent, nor behind the newest."""
    return question.after or (_BEFORE_ALL if isinstance(question, Offline) else _BEHIND_ALL)


def _page(question: Offline | UnityDown, count: int, rows: list[Any]) -> Found:
    """As many as were asked for, of what may be one more."""
    more = len(rows) > question.limit
    rows = rows[: question.limit]
    return Found(count, rows, Place(rows[-1].heard_at, rows[-1].device_id) if more else None)


@dataclass(frozen=True)
class FromHistory:
    """Answers from the history, in the same shape. Who is silent for longer than `retention` is inactive."""

    retention: timedelta
    source = "legacy"

    async def ask(self, conn: Conn, question: Question, known: Presence) -> Found:
        """The answer at `known.now`."""
        now = known.now
        until, known_since = now + LOOKS_AHEAD, now - self.retention
        if isinstance(question, OneDevice):
            records = await conn.fetch(_LEGACY["device"], question.device_id, until, known_since)
            return _one(records, known, question.online_within)
        if isinstance(question, Offline):
            silent = known.silent(question.silent_for)
            records = await conn.fetch(
                _LEGACY["list_offline"], silent.before, silent.multirange, until, known_since, question.limit + 1,
                *_place(question),
            )  # fmt: skip
            return _page(question, _total(records), _silent(records, known))
        since = now - SEEN_WITHIN
        records = await conn.fetch(
            _LEGACY["list_unity_down"], since, until, since - QUEUED_FOR, question.limit + 1, *_place(question)
        )
        return _page(question, _total(records), _there(records, known, question.online_within))


def _total(records: list[asyncpg.Record]) -> int:
    return records[0]["total"] if records else 0


def skew_s(last_ts: datetime | None, received_at: datetime, clock_wrong: bool) -> int | None:
    """How many seconds a device's clock is ahead (behind: negative), as its last heartbeat says; None where nothing is
    known, or the clock lies outside the accept window. What came from a queue was made earlier than it was received."""
    if last_ts is None or clock_wrong:
        return None
    return round((last_ts - received_at).total_seconds())


# A list has thousands of rows, and whatever is done to one holds up heartbeats: as a dict it took 0.7 µs to make and
# 0.3 to write as JSON, as an object with slots 0.25 and 0.14.
@functools.cache
def _made_of(columns: tuple[str, ...]) -> Callable[..., Any]:
    return msgspec.defstruct("Listed", [(column, Any, None) for column in columns], gc=False)


def _listed(records: list[asyncpg.Record], *more: str) -> list[Any]:
    """Objects with the columns as attributes, and `more` that are None yet; without the total, which stands last."""
    if not records:
        return []
    columns = [column for column in records[0].keys() if column != "total"]  # noqa: SIM118 - a Record iterates its values
    make, width = _made_of((*columns, *more)), len(columns)
    return [make(*record[:width]) for record in records]


def _silent(records: list[asyncpg.Record], known: Presence) -> list[Any]:
    """The same with clock_skew_seconds and offline_seconds."""
    rows = _listed(records, "clock_skew_seconds", "offline_seconds")
    for row in rows:
        row.clock_skew_seconds = skew_s(row.last_ts, row.received_at, row.clock_wrong)
        row.offline_seconds = int(known.silence(row.heard_at).total_seconds())
    return rows


def _there(records: list[asyncpg.Record], known: Presence, online_within: timedelta) -> list[Any]:
    """The same with clock_skew_seconds and whether they are online."""
    rows = _listed(records, "clock_skew_seconds", "online")
    for row in rows:
        row.clock_skew_seconds = skew_s(row.last_ts, row.received_at, row.clock_wrong)
        row.online = row.heard_at is not None and known.silence(row.heard_at) <= online_within
    return rows


def _one(records: list[asyncpg.Record], known: Presence, online_within: timedelta) -> Found:
    return Found(len(records), _there(records, known, online_within))


# ---- over a pool ----------------------------------------------------------------------------------------------------


class Answers:
    """Questions answered one way, over a bounded pool. `interval`: between two heartbeats of a device."""

    def __init__(self, pool: Pool, way: FromStatus | FromHistory, interval: timedelta) -> None:
        self._pool = pool
        self._way = way
        self._interval = interval

    @property
    def source(self) -> str:
        """Where the answers come from: last_status or legacy."""
        return self._way.source

    async def ask(self, question: Question, now: datetime) -> tuple[Presence, Found]:
        """The answer, and how silence is counted in it. Raises UnknownDevice, and DatabaseUnavailable also where too
        many wait for the pool."""
        async with _asking(self._pool, self._observe(question.name)) as conn:
            known = await taking.read(conn, now, self._interval)
            found = await self._way.ask(conn, question, known)
        if isinstance(question, OneDevice) and not found.rows:
            raise UnknownDevice(f"{quoted(question.device_id)}.")
        return known, found

    def _observe(self, query: str) -> Callable[[float], None]:
        if isinstance(self._way, FromHistory):
            return metrics.legacy_read_latency.labels(query=query).observe
        return _last_status_latency(query)


class Reads(Answers):
    """Everything that operators ask of device_last_status, and a device's history."""

    def __init__(self, pool: Pool, interval: timedelta) -> None:
        super().__init__(pool, FromStatus(), interval)

    async def fleet(self, now: datetime, offline_after: timedelta) -> tuple[Presence, Row]:
        """Counts: devices, online, offline, unity_down (and of those, online), inactive (silent for longer than the
        retention), never_seen."""
        async with self._asking("fleet") as conn:
            known = await taking.read(conn, now, self._interval)
            silent = known.silent(offline_after)
            row = await conn.fetchrow(_Q["fleet"], silent.before, silent.multirange, now - SEEN_WITHIN)
        return known, dict(row or {})

    async def devices(
        self, after: str, limit: int, now: datetime, online_within: timedelta
    ) -> tuple[Presence, list[Any]]:
        """A page of status rows by device_id, from behind `after`."""
        async with self._asking("devices") as conn:
            known = await taking.read(conn, now, self._interval)
            records = await conn.fetch(_Q["devices"], after, limit)
        return known, _there(records, known, online_within)

    async def troubles(self, device_id: str) -> tuple[Row | None, Row | None]:
        """Its last refusal, and since when two kiosks share its token; None where there is none, or no such device."""
        async with self._asking("troubles") as conn:
            row = await conn.fetchrow(_Q["troubles"], device_id)
        if row is None:
            return None, None
        refusal = {"at": row["refused_at"], **{name: row[name] for name in ("status", "reason", "field")}}
        shared = {"since": row["since"], "last_at": row["last_at"], "kiosks": json.loads(row["evidence"] or "[]")}
        return refusal if row["refused_at"] else None, shared if row["since"] else None

    async def history(
        self, device_id: str, start: datetime, end: datetime, limit: int, after: int | None = None
    ) -> tuple[list[Row], int | None]:
        """Its heartbeats with start ≤ ts < end, newest first, from behind the bucket `after`; and the last one's bucket
        where there are more. Raises UnknownDevice."""
        if after is not None:  # a bucket is an hour long at most, and the partitions behind it need not be opened
            end = min(end, _BUCKETS_FROM + timedelta(seconds=after + 3600))
        async with self._asking("history") as conn:
            device_no = await conn.fetchval(_Q["device_no"], device_id)
            if device_no is None:
                raise UnknownDevice(f"{quoted(device_id)}.")
            bound = _LAST_BUCKET if after is None else after
            rows = _rows(await conn.fetch(_Q["history"], device_no, start, end, limit + 1, bound))
        buckets = [row.pop("bucket") for row in rows]
        return rows[:limit], buckets[limit - 1] if len(rows) > limit else None

    @asynccontextmanager
    async def _asking(self, query: str) -> AsyncIterator[PoolConnectionProxy]:
        async with _asking(self._pool, _last_status_latency(query)) as conn:
            yield conn


def _last_status_latency(query: str) -> Callable[[float], None]:
    series = metrics.last_status_read_latency_ms.labels(query=query)
    return lambda seconds: series.observe(seconds * 1000)


@asynccontextmanager
async def _asking(pool: Pool, observe: Callable[[float], None]) -> AsyncIterator[PoolConnectionProxy]:
    """A connection of the pool, the seconds it takes as a metric, the database's absence as DatabaseUnavailable."""
    started = time.perf_counter()
    try:
        async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
            yield conn
    except Exception as error:
        if is_unavailable(error):
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
        raise
    observe(time.perf_counter() - started)


def _rows(records: list[asyncpg.Record]) -> list[Row]:
    return [dict(record) for record in records]
