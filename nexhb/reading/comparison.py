"""Compare reads from device_last_status with the same reads from the history: how long each takes, and whether the
results agree. The caller does not wait for the comparison. If the results disagree too often, the fast reads are turned
off.

Both queries run in one snapshot with the same `now`, so that concurrent writes cause no difference. A difference is
excused, which means that it does not count, if neither result is wrong (see `excuse`).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from nexhb import availability, log, metrics, partitions
from nexhb.config import Settings
from nexhb.devices.presence import Presence
from nexhb.errors import described
from nexhb.heartbeat import bucket_of
from nexhb.partitions import Partition
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.kept_connection import KeptConnection
from nexhb.reading.flags import FlagStore
from nexhb.reading.history import HISTORY_SESSION, MAX_CLOCK_AHEAD, HistoryReader
from nexhb.reading.last_status import LastStatusReader
from nexhb.reading.queries import Query, ReadResult

_Q = sql.queries("comparison")
_log = log.get("perf_diff")

BUDGET_PERIOD = timedelta(hours=1)
EXAMPLES = 5
PRESENCE = {
    "heard_at",
    "offline_seconds",
    "online",
    "state",
    "status",
}  # columns that depend on the time of the last heartbeat
IDLE_S = 60.0  # seconds without a query after which the connection is closed
CHANGED_BY = "perf_diff"


# ---- differences, and whether they count: pure ----------------------------------------------------------------------


def differing(fast: ReadResult, history: ReadResult) -> list[str]:
    """Return the ids of the devices whose rows differ. If a list was cut at its limit, compare only the devices in both
    lists: an excused row may push another device off the end of one list."""
    from_history = {row.device_id: row for row in history.rows}
    from_status = {row.device_id: row for row in fast.rows}
    is_cut = fast.count > len(fast.rows) or history.count > len(history.rows)
    ids = from_status.keys() & from_history.keys() if is_cut else from_status.keys() | from_history.keys()
    return sorted(device_id for device_id in ids if from_status.get(device_id) != from_history.get(device_id))


def is_same_content(device_id: str, fast: ReadResult, history: ReadResult) -> bool:
    """Return whether a device's two rows differ in nothing but its presence; true if only one result lists the
    device."""
    rows = [
        msgspec.structs.asdict(row) for result in (fast, history) for row in result.rows if row.device_id == device_id
    ]
    contents = [{name: value for name, value in row.items() if name not in PRESENCE} for row in rows]
    return len(contents) < 2 or contents[0] == contents[1]


def complete_since(attached: Sequence[Partition], now: datetime, retention: timedelta) -> datetime:
    """Return the time since which the history is complete (every day is attached), at most `retention` before `now`."""
    day = now.date()
    start = partitions.midnight(day)
    while any(p.covers(day) and not p.detach_pending and not p.sealed for p in attached):
        start, day = partitions.midnight(day), day - timedelta(days=1)
    return max(start, now - retention)


def excuse(evidence: Mapping[str, Any], since: datetime, bucket_seconds: int, *, same_content: bool) -> str | None:
    """Return why a device's two results may differ although neither is wrong; None if one is wrong. `evidence` is a row
    of the query `evidence`; `same_content` means that the results differ only in the device's presence.

    - beyond_history: the device's last heartbeat is before `since`, in a day that is archived or detached, or soon will
      be. The next nightly run will mark such a device as inactive.
    - late: the last heartbeat arrived after its day was detached, and is in late_heartbeats.
    - heard_again: the last heartbeat was a duplicate, which updates the presence but adds no row to the history.
    - partial: the last heartbeat lacks fields, for which the last status keeps the values of the previous heartbeat.
    - same_bucket: two heartbeats fell into the same bucket. The history keeps the first, the last status the newest. If
      both rows have the same ts and arrival, they must be equal, unless the device's clock was wrong: then all
      heartbeats of a queue that was replayed in one request have the same ts and arrival.
    """
    status_ts, history_ts = evidence["status_ts"], evidence["history_ts"]
    newest = [ts for ts in (status_ts, history_ts) if ts is not None]
    if newest and max(newest) < since:
        return "beyond_history"
    if evidence["late"]:
        return "late"
    if status_ts is None or history_ts is None:
        return None
    same_arrival = (status_ts, evidence["status_received_at"]) == (history_ts, evidence["history_received_at"])
    if same_content and same_arrival and evidence["status_heard_at"] > evidence["history_heard_at"]:
        return "heard_again"
    if evidence["partial"]:
        return "partial"
    may_differ = evidence["clock_wrong"] or not same_arrival
    same_bucket = bucket_of(status_ts, bucket_seconds) == evidence["history_bucket"]
    return "same_bucket" if may_differ and same_bucket else None


@dataclass(frozen=True)
class Comparison:
    """The results of one query from both sources."""

    query: str
    at: datetime
    fast_ms: float
    history_ms: float
    fast_rows: int
    history_rows: int
    mismatches: list[str]  # ids of the devices whose rows differ
    excused: int

    @property
    def result(self) -> str:
        """The value of the label `result` in the metric of comparisons."""
        return "differs" if self.mismatches else "same"

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the log event."""
        return {
            "query": self.query,
            "fast_ms": round(self.fast_ms, 3),
            "legacy_ms": round(self.history_ms, 3),
            "speed_up": round(self.history_ms / max(self.fast_ms, 0.001), 1),
            "fast_rows": self.fast_rows,
            "legacy_rows": self.history_rows,
            "rows_differ": len(self.mismatches),
            "excused": self.excused,
            "examples": self.mismatches[:EXAMPLES],
        }


async def compare(conn: Connection, query: Query, now: datetime, settings: Settings) -> Comparison:
    """Run `query` on both sources, in one snapshot. `conn` must not be in a transaction."""
    retention = timedelta(days=settings.partitions.retention_days)
    fast_reader, history_reader = LastStatusReader(), HistoryReader(retention)
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        presence = await availability.read(conn, now, timedelta(seconds=settings.heartbeat.interval_seconds))
        await fast_reader.run(conn, query, presence)  # not timed: it reads the catalog, as each connection does once
        fast_s, fast = await _timed(conn, fast_reader, query, presence)
        history_s, history = await _timed(conn, history_reader, query, presence)
        differ = differing(fast, history)
        excused: set[str] = set()
        if differ:
            since = complete_since(await partitions.attached(conn), now, retention)
            for row in await conn.fetch(_Q["evidence"], differ, now + MAX_CLOCK_AHEAD):
                device_id = row["device_id"]
                same_content = is_same_content(device_id, fast, history)
                if excuse(dict(row), since, settings.ingest.bucket_seconds, same_content=same_content):
                    excused.add(device_id)
    return Comparison(
        query.name, now, fast_s * 1000, history_s * 1000, fast.count, history.count,
        [device_id for device_id in differ if device_id not in excused], len(excused),
    )  # fmt: skip


async def _timed(
    conn: Connection, reader: LastStatusReader | HistoryReader, query: Query, presence: Presence
) -> tuple[float, ReadResult]:
    started = time.perf_counter()
    result = await reader.run(conn, query, presence)
    return time.perf_counter() - started, result


# ---- in the daemon --------------------------------------------------------------------------------------------------


class PerfDiff:
    """Compares a share of the queries, one at a time; at most one more query waits."""

    def __init__(
        self,
        database: Database,
        flags: FlagStore,
        settings: Settings,
        now: Callable[[], datetime],
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._flags = flags
        self._settings = settings
        self._now = now
        self._random_fraction = random_fraction
        self._waiting: asyncio.Queue[Query] = asyncio.Queue(1)
        timeout_s = settings.reads.legacy_timeout_seconds
        self._conn = KeptConnection(
            database,
            application="nexhb perf_diff",
            command_timeout_s=timeout_s + 1,
            statement_timeout=f"{round(timeout_s * 1000)}",
            **HISTORY_SESSION,
        )

    def offer(self, query: Query) -> None:
        """Offer a query that was just answered, without blocking. It is compared later, or dropped and counted."""
        if not self._flags.current.perf_diff or self._random_fraction() * 100 >= self._settings.reads.perf_diff_percent:
            return
        if self._waiting.full():
            metrics.perf_diff_comparisons.labels(query=query.name, result="dropped").inc()
            return
        self._waiting.put_nowait(query)

    async def run(self) -> None:
        """Compare offered queries until cancelled. An error, even of the database, ends only the comparison."""
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        query = await self._waiting.get()
                except TimeoutError:
                    await self._conn.close()
                    continue
                try:
                    history_s = await self._compare(query)
                    await asyncio.sleep(history_s)  # so that comparisons use half of a core at most
                except Exception as error:
                    metrics.perf_diff_comparisons.labels(query=query.name, result="failed").inc()
                    _log.warning("perf_diff.failed", query=query.name, error=described(error))
                    await self._conn.close()
        finally:
            await self._conn.close()

    async def _compare(self, query: Query) -> float:
        """Compare, store the comparison and check the budget. Return the duration of the read of the history, in s."""
        conn = await self._conn.get()
        comparison = await compare(conn, query, self._now(), self._settings)
        await conn.execute(
            _Q["add"], comparison.query, comparison.at, comparison.fast_ms, comparison.history_ms,
            comparison.fast_rows, comparison.history_rows, len(comparison.mismatches),
            comparison.mismatches[:EXAMPLES], socket.gethostname(),
        )  # fmt: skip
        name = comparison.query
        metrics.perf_diff_latency.labels(query=name, source="last_status").observe(comparison.fast_ms / 1000)
        metrics.perf_diff_latency.labels(query=name, source="legacy").observe(comparison.history_ms / 1000)
        metrics.perf_diff_comparisons.labels(query=name, result=comparison.result).inc()
        log_event = _log.warning if comparison.mismatches else _log.info
        log_event("perf_diff.query_comparison", **comparison.log_fields())
        if comparison.mismatches:
            await self._check_budget(conn, comparison)
        return comparison.history_ms / 1000

    async def _check_budget(self, conn: Connection, comparison: Comparison) -> None:
        mismatches = await count_mismatches(conn, comparison.at - BUDGET_PERIOD, comparison.at + MAX_CLOCK_AHEAD)
        budget = self._settings.reads.perf_diff_budget
        if mismatches < budget or not self._flags.current.read_from_last_status:
            return
        await self._flags.change({"read_from_last_status": False}, CHANGED_BY)
        metrics.perf_diff_turned_off.inc()
        _log.error(
            "perf_diff.turned_off", mismatches=mismatches, budget=budget, query=comparison.query,
            examples=comparison.mismatches[:EXAMPLES],
            hint="nexhb perf-diff report; nexhb reconcile; then nexhb flags set read_from_last_status=on",
        )  # fmt: skip


# ---- stored comparisons ---------------------------------------------------------------------------------------------


async def count_mismatches(conn: Connection, since: datetime, until: datetime) -> int:
    """Return how many comparisons of all daemons differed between `since` and `until`, and after the fast reads were
    last switched on. A comparison after `until` was written by a clock that is ahead, and does not count."""
    return int(await conn.fetchval(_Q["mismatches"], since, until))


async def report(conn: Connection, since: datetime) -> dict[str, Any]:
    """Return the comparisons after `since`: one row for each query, the last mismatches, and the number of others."""
    queries = [dict(row) for row in await conn.fetch(_Q["report"], since)]
    last = [dict(row) for row in await conn.fetch(_Q["last_mismatches"], since, 10)]
    more = max(sum(row["mismatches"] for row in queries) - len(last), 0)
    return {"since": since, "queries": queries, "last_mismatches": last, "mismatches_not_listed": more}
