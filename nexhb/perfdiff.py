"""Reads asked both ways, from device_last_status and from the history, off the caller's path: how long each takes, and
whether they agree. Where they do not, too often, the fast reads are turned off.

Both queries run in one snapshot and at one moment, so nothing that is written meanwhile can differ. What differs for a
reason that makes neither answer wrong is left out (see `excuse`).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from nexhb import log, metrics, partitions, sql, taking, wire
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.flags import FlagStore
from nexhb.partitions import Partition
from nexhb.presence import Presence
from nexhb.reads import LEGACY_SESSION, LOOKS_AHEAD, Found, FromHistory, FromStatus, Question, Row

_Q = sql.queries("perfdiff")
_log = log.get("perf_diff")

BUDGET_OVER = timedelta(hours=1)
EXAMPLES = 5
PRESENCE = {"heard_at", "offline_seconds", "online", "status"}  # the columns that follow from when a device was heard
IDLE_S = 60.0  # without a question for so long, the connection is given back
BY = "perf_diff"


# ---- what differs, and what of it counts: pure -----------------------------------------------------------------------


def differing(fast: Found, legacy: Found) -> list[str]:
    """The device_ids whose rows are not the same both ways. Where a list was cut at its limit, only of those in both:
    which come last in it may depend on a row that is excused."""
    theirs = {row.device_id: row for row in legacy.rows}
    ours = {row.device_id: row for row in fast.rows}
    cut = fast.count > len(fast.rows) or legacy.count > len(legacy.rows)
    wanted = ours.keys() & theirs.keys() if cut else ours.keys() | theirs.keys()
    return sorted(one for one in wanted if ours.get(one) != theirs.get(one))


def same_content(device_id: str, fast: Found, legacy: Found) -> bool:
    """Whether nothing but a device's presence differs, as far as both ways list it."""
    rows = [msgspec.structs.asdict(row) for found in (fast, legacy) for row in found.rows if row.device_id == device_id]
    contents = [{name: value for name, value in row.items() if name not in PRESENCE} for row in rows]
    return len(contents) < 2 or contents[0] == contents[1]


def known_since(attached: Sequence[Partition], now: datetime, retention: timedelta) -> datetime:
    """How far back the history is whole: the days attached without a gap up to now, the retention at most."""
    day = now.date()
    start = partitions.midnight(day)
    while any(p.covers(day) and not p.detach_pending and not p.sealed for p in attached):
        start, day = partitions.midnight(day), day - timedelta(days=1)
    return max(start, now - retention)


def excuse(standing: Mapping[str, Any], since: datetime, bucket_seconds: int, *, same: bool) -> str | None:
    """Why this device's answers may differ though neither is wrong; None where one is. `standing`: a row of standings;
    `same`: nothing but its presence differs.

    - beyond_history: its last heartbeat lies before `since`, in a day that is archived, detached or about to be; such
      a device is also marked inactive, but only by the next nightly run.
    - late: its last heartbeat came after its day was detached, and waits beside it.
    - heard_again: what it sent last was a duplicate, which is a sign of life and no row of the history.
    - partial: its last heartbeat leaves something out, of which the last status keeps what the one before it said.
    - same_bucket: two heartbeats of the same bucket; the history keeps the first, the last status the newest. Of one
      and the same arrival everything must be the same, but where its clock was wrong: then a queue that was replayed
      at once has one ts and one arrival.
    """
    status_ts, history_ts = standing["status_ts"], standing["history_ts"]
    newest = [ts for ts in (status_ts, history_ts) if ts is not None]
    if newest and max(newest) < since:
        return "beyond_history"
    if standing["late"]:
        return "late"
    if status_ts is None or history_ts is None:
        return None
    same_arrival = (status_ts, standing["status_received_at"]) == (history_ts, standing["history_received_at"])
    if same and same_arrival and standing["status_heard_at"] > standing["history_heard_at"]:
        return "heard_again"
    if standing["partial"]:
        return "partial"
    may_differ = standing["clock_wrong"] or not same_arrival
    same_bucket = wire.bucket_of(status_ts, bucket_seconds) == standing["history_bucket"]
    return "same_bucket" if may_differ and same_bucket else None


@dataclass(frozen=True)
class Comparison:
    """One question, asked both ways."""

    query: str
    at: datetime
    fast_ms: float
    legacy_ms: float
    fast_rows: int
    legacy_rows: int
    differ: list[str]  # device_ids
    excused: int

    @property
    def result(self) -> str:
        """As the metric has it."""
        return "differs" if self.differ else "same"

    def shown(self) -> Row:
        """As it is logged."""
        return {
            "query": self.query,
            "fast_ms": round(self.fast_ms, 3),
            "legacy_ms": round(self.legacy_ms, 3),
            "speed_up": round(self.legacy_ms / max(self.fast_ms, 0.001), 1),
            "fast_rows": self.fast_rows,
            "legacy_rows": self.legacy_rows,
            "rows_differ": len(self.differ),
            "excused": self.excused,
            "examples": self.differ[:EXAMPLES],
        }


async def compare(conn: Connection, question: Question, now: datetime, settings: Settings) -> Comparison:
    """Ask `question` both ways, in one snapshot. `conn` must not be in a transaction."""
    retention = timedelta(days=settings.partitions.retention_days)
    fast_way, legacy_way = FromStatus(), FromHistory(retention)
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        known = await taking.read(conn, now, timedelta(seconds=settings.heartbeat.interval_seconds))
        await fast_way.ask(conn, question, known)  # a caller's connection has read the catalog already
        fast_s, fast = await _timed(conn, fast_way, question, known)
        legacy_s, legacy = await _timed(conn, legacy_way, question, known)
        differ = differing(fast, legacy)
        excused: set[str] = set()
        if differ:
            since = known_since(await partitions.attached(conn), now, retention)
            standings = await conn.fetch(_Q["standings"], differ, now + LOOKS_AHEAD)
            excused = {
                row["device_id"]
                for row in standings
                if excuse(
                    dict(row), since, settings.ingest.bucket_seconds, same=same_content(row["device_id"], fast, legacy)
                )
            }
    return Comparison(
        question.name, now, fast_s * 1000, legacy_s * 1000, fast.count, legacy.count,
        [one for one in differ if one not in excused], len(excused),
    )  # fmt: skip


async def _timed(
    conn: Connection, way: FromStatus | FromHistory, question: Question, known: Presence
) -> tuple[float, Found]:
    started = time.perf_counter()
    found = await way.ask(conn, question, known)
    return time.perf_counter() - started, found


# ---- the daemon's own -----------------------------------------------------------------------------------------------


class PerfDiff:
    """Compares a share of the questions: one at a time, while one waits."""

    def __init__(
        self,
        database: Database,
        flags: FlagStore,
        settings: Settings,
        now: Callable[[], datetime],
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._flags = flags
        self._settings = settings
        self._now = now
        self._random_fraction = random_fraction
        self._wanted: asyncio.Queue[Question] = asyncio.Queue(1)
        self._conn: Connection | None = None

    def offer(self, question: Question) -> None:
        """A question that was answered. Takes no time: whether it is compared, and when, is not the caller's affair."""
        if not self._flags.current.perf_diff or self._random_fraction() * 100 >= self._settings.reads.perf_diff_percent:
            return
        if self._wanted.full():
            metrics.perf_diff_comparisons.labels(query=question.name, result="dropped").inc()
            return
        self._wanted.put_nowait(question)

    async def run(self) -> None:
        """Compare what is offered until cancelled. The database's absence costs comparisons and nothing else."""
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        question = await self._wanted.get()
                except TimeoutError:
                    await self._disconnect()
                    continue
                try:
                    took_s = await self._compare(question)
                    await asyncio.sleep(took_s)  # half of a core at most, however much is read
                except Exception as error:
                    metrics.perf_diff_comparisons.labels(query=question.name, result="failed").inc()
                    _log.warning("perf_diff.failed", query=question.name, error=f"{type(error).__name__}: {error}")
                    await self._disconnect()
        finally:
            await self._disconnect()

    async def _compare(self, question: Question) -> float:
        """Compare, write down, hold against the budget; how long the slow way took (s)."""
        conn = await self._connection()
        found = await compare(conn, question, self._now(), self._settings)
        await conn.execute(
            _Q["add"], found.query, found.at, found.fast_ms, found.legacy_ms, found.fast_rows, found.legacy_rows,
            len(found.differ), found.differ[:EXAMPLES], socket.gethostname(),
        )  # fmt: skip
        metrics.perf_diff_latency.labels(query=found.query, source="last_status").observe(found.fast_ms / 1000)
        metrics.perf_diff_latency.labels(query=found.query, source="legacy").observe(found.legacy_ms / 1000)
        metrics.perf_diff_comparisons.labels(query=found.query, result=found.result).inc()
        say = _log.warning if found.differ else _log.info
        say("perf_diff.query_comparison", **found.shown())
        if found.differ:
            await self._hold_against_the_budget(conn, found)
        return found.legacy_ms / 1000

    async def _hold_against_the_budget(self, conn: Connection, found: Comparison) -> None:
        wrong = await mismatches(conn, found.at - BUDGET_OVER, found.at + LOOKS_AHEAD)
        budget = self._settings.reads.perf_diff_budget
        if wrong < budget or not self._flags.current.read_from_last_status:
            return
        await self._flags.change({"read_from_last_status": False}, BY)
        metrics.perf_diff_turned_off.inc()
        _log.error(
            "perf_diff.turned_off", mismatches=wrong, budget=budget, query=found.query,
            examples=found.differ[:EXAMPLES],
            hint="nexhb perf-diff report; nexhb reconcile; then nexhb flags set read_from_last_status=on",
        )  # fmt: skip

    async def _connection(self) -> Connection:
        if self._conn is None or self._conn.is_closed():
            timeout_s = self._settings.reads.legacy_timeout_seconds
            self._conn = await self._database.connect(
                application="nexhb perf_diff",
                command_timeout_s=timeout_s + 1,
                statement_timeout=f"{round(timeout_s * 1000)}",
                **LEGACY_SESSION,
            )
        return self._conn

    async def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(Exception):
                await conn.close(timeout=2)


# ---- what was found -------------------------------------------------------------------------------------------------


async def mismatches(conn: Connection, since: datetime, until: datetime) -> int:
    """Comparisons that differed since then, and since the fast reads were last switched on; of all daemons. What lies
    after `until` was written by a clock that was ahead, and counts as none."""
    return int(await conn.fetchval(_Q["mismatches"], since, until))


async def report(conn: Connection, since: datetime) -> Row:
    """What was compared since then: a row a query, and the last mismatches, with how many there are besides."""
    queries = [dict(row) for row in await conn.fetch(_Q["report"], since)]
    last = [dict(row) for row in await conn.fetch(_Q["last_mismatches"], since, 10)]
    more = max(sum(row["mismatches"] for row in queries) - len(last), 0)
    return {"since": since, "queries": queries, "last_mismatches": last, "mismatches_not_listed": more}
