"""Look up tokens that nexhb does not know in NexMDM's database, as long as NexMDM runs. When a device that enrolled in
NexMDM sends its first heartbeat, the device is imported as by `nexhb import-legacy`.

There is one read-only connection. One query at a time serves all waiting tokens, with a pause after each query. A token
is unknown only if NexMDM's database was read and does not have it; otherwise the result is UNVERIFIED.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from asyncpg import Record

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable, described
from nexhb.nexmdm import devices as nexmdm_devices
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.source import NexmdmDatabase
from nexhb.postgres import sql
from nexhb.postgres.connections import Database
from nexhb.postgres.identity import DatabaseTracker
from nexhb.rate_limit import RateLimiter

_Q = sql.queries("nexmdm_import")
_log = log.get("legacy")

NAME = "legacy.source"  # the source's name in messages
MAX_BATCH = 100  # limit of tokens in one look-up
MAX_QUEUED = 1_000  # limit of tokens that wait for a look-up; devices with further tokens must retry
MAX_WAITING = 100  # limit of requests that wait for a result; others get a response at once, their tokens stay queued
WAIT_S = 3.0  # how long a request waits for a result
LOOKUP_TIMEOUT_S = 5.0  # timeout of one look-up, including the time to connect if there is no connection
PAUSE_FACTOR = 3  # pause after a look-up, in multiples of its duration: look-ups run a quarter of the time at most
RETRY_S, MAX_RETRY_S = 1.0, 30.0  # pause after the first failed look-up, and the longest pause
UNKNOWN_TTL_S = 60.0  # how long a result UNKNOWN is kept: NexMDM stores a token before a device gets it
MAX_REMEMBERED = 10_000  # limit of remembered tokens
MAX_HASHED_IMPORTED = 2_000  # limit of devices with only a bcrypt hash that one look-up imports
MAX_HASHED_REMEMBERED = 200_000
MAX_CLOCK_DIFFERENCE = timedelta(minutes=1)  # largest assumed difference between the clocks of standby and primary


class LookupResult(enum.Enum):
    """The result of looking up an unknown token in NexMDM's database."""

    IMPORTED = "taken"  # nexhb knows the token now: its device was imported, possibly as revoked
    UNKNOWN = "unknown"  # NexMDM does not know the token either, or nexhb has replaced it
    UNVERIFIED = "unsure"  # NexMDM's database could not be read


class Lookup:
    """The daemon's look-ups. The coroutine `run` queries NexMDM's database."""

    def __init__(
        self, dsn: str, database: Database, now: Callable[[], datetime], tracker: DatabaseTracker | None = None
    ) -> None:
        self._dsn = dsn
        self._database = database
        self._now = now
        self._tracker = tracker or DatabaseTracker()
        self._tracker.on_change(self._forget)
        self._queue: OrderedDict[bytes, asyncio.Future[LookupResult]] = OrderedDict()
        self._waiting = 0  # number of waiting requests
        self._failures = 0  # number of consecutive failed look-ups
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._first_lookup_at: OrderedDict[bytes, datetime] = OrderedDict()  # times by the clock of a standby
        self._hashed_ids: set[str] = set()  # imported devices of which NexMDM has only a hash
        self._wake = asyncio.Event()
        self._stack: AsyncExitStack | None = None
        self._source: NexmdmDatabase | None = None
        self._logged = RateLimiter(burst=5, per_second=0.02)

    def _forget(self) -> None:
        """Drop the record of what was imported into the previous database of nexhb: the new database may lack it."""
        self._unknown.clear()
        self._hashed_ids.clear()

    @property
    def problem(self) -> str:
        """The message that this daemon cannot query NexMDM's database; empty while it can, or has not tried yet."""
        if not self._failures:
            return ""
        return f"{NAME} cannot be queried by this daemon: tokens that nexhb does not know receive 503."

    async def look_up(self, token_sha256: bytes) -> LookupResult:
        """Return what NexMDM's database says about this token, within WAIT_S."""
        if time.monotonic() - self._unknown.get(token_sha256, float("-inf")) < UNKNOWN_TTL_S:
            return LookupResult.UNKNOWN
        pending = self._queue.get(token_sha256)
        if pending is None:
            if len(self._queue) >= MAX_QUEUED:
                metrics.legacy_lookups.labels(outcome="put_off").inc()
                return LookupResult.UNVERIFIED
            pending = self._queue[token_sha256] = asyncio.get_running_loop().create_future()
            self._wake.set()
        if self._failures or self._waiting >= MAX_WAITING:
            return LookupResult.UNVERIFIED
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(pending)
        except TimeoutError:
            return LookupResult.UNVERIFIED
        finally:
            self._waiting -= 1

    async def run(self) -> None:
        """Look up waiting tokens until cancelled. No error ends this task."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := list(islice(self._queue, MAX_BATCH)):
                started = time.monotonic()
                try:
                    results = await self._query_in_time(batch)
                except Exception as error:  # no error may end the daemon, which serves other devices too
                    await self._fail(error)
                else:
                    self._failures = 0
                    self._settle(results)
                    await asyncio.sleep(PAUSE_FACTOR * (time.monotonic() - started))

    def _terminate(self) -> None:
        if self._source is not None:
            self._source.conn.terminate()

    async def close(self) -> None:
        """Close the connection to NexMDM's database."""
        stack, self._stack, self._source = self._stack, None, None
        if stack is not None:
            with suppress(Exception):
                await stack.aclose()

    # ---- one look-up ------------------------------------------------------------------------------------------

    async def _query_in_time(self, batch: Sequence[bytes]) -> dict[bytes, LookupResult]:
        # The connection is terminated, because a rollback after the timeout would wait for the same server.
        timer = asyncio.get_running_loop().call_later(LOOKUP_TIMEOUT_S, self._terminate)
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                return await self._query(batch)
        finally:
            timer.cancel()

    async def _query(self, batch: Sequence[bytes]) -> dict[bytes, LookupResult]:
        epoch = self._tracker.epoch
        source = await self._open_source()
        # In one snapshot: between two of these queries, NexMDM may store the token_id of a device that had only a hash.
        async with source.conn.transaction(isolation="repeatable_read", readonly=True):
            state = await source.state()
            rows = await source.devices_with([token.hex() for token in batch])
            hashed, is_complete = await self._new_hashed_devices(source) if state.has_hashes else ([], True)
        imported, rejected = await self._import([*rows, *hashed], batch)
        self._tracker.require_epoch(epoch)
        self._hashed_ids.update(row["id"] for row in hashed)
        results = {}
        for token in batch:
            is_unknown = is_complete and token.hex() not in rejected and self._is_conclusive(token, state)
            otherwise = LookupResult.UNKNOWN if is_unknown else LookupResult.UNVERIFIED
            results[token] = LookupResult.IMPORTED if token in imported else otherwise
        return results

    async def _open_source(self) -> NexmdmDatabase:
        if self._source is None or self._source.conn.is_closed():
            await self.close()
            stack = AsyncExitStack()
            opening = sources.opened(
                self._dsn, name=NAME, application="nexhb look-up", timeout_s=LOOKUP_TIMEOUT_S, for_history=False
            )
            self._source = await stack.enter_async_context(opening)
            self._stack = stack
        return self._source

    async def _new_hashed_devices(self, source: NexmdmDatabase) -> tuple[list[Record], bool]:
        """Return devices with only a hash that are not imported yet, and whether all such devices are returned."""
        devices: list[Record] = []
        if len(self._hashed_ids) > MAX_HASHED_REMEMBERED:
            self._hashed_ids.clear()
        async for page in source.devices(only_hashed=True):
            devices += [row for row in page if row["id"] not in self._hashed_ids]
            if len(devices) > MAX_HASHED_IMPORTED:
                return devices[:MAX_HASHED_IMPORTED], False
        return devices, True

    async def _import(self, rows: list[Record], batch: Sequence[bytes]) -> tuple[set[bytes], set[str]]:
        """Import these devices. Return the tokens of the batch that nexhb knows now, and the token_ids of the
        devices that were rejected."""
        if not rows:
            return set(), set()
        if self._tracker.older_copy:
            raise DatabaseUnavailable(self._tracker.older_copy)
        connected = self._database.connected(
            application="nexhb taking over", command_timeout_s=LOOKUP_TIMEOUT_S, lock_timeout="3000"
        )
        async with connected as conn:
            source_name = self._source.name if self._source else ""
            result = await nexmdm_devices.import_rows(conn, rows, self._now(), source_name)
            known = {row["token_sha256"] for row in await conn.fetch(_Q["known_tokens"], list(batch))}
        rejected = {row["token_id"] for row in rows if row["id"] in result.rejected_ids}
        token_ids = {token.hex() for token in known}
        for row in rows:
            if row["token_id"] in token_ids:
                _log.info("device.taken_over", device_id=row["id"], revoked=row["token_revoked_at"] is not None)
            elif row["token_id"] is not None:
                reason = "nexhb does not allow its id" if row["token_id"] in rejected else "nexhb replaced the token"
                _log.warning("device.not_taken_over", device_id=row["id"], why=reason)
        return known, rejected

    def _is_conclusive(self, token: bytes, state: sources.SourceState) -> bool:
        """Return whether NexMDM certainly does not know a token that the source lacks. A standby may lag, so it must
        have replayed a commit that is later than the first heartbeat with the token."""
        if not state.is_standby:
            return True
        first_lookup_at = self._first_lookup_at.setdefault(token, state.clock)
        _trim(self._first_lookup_at)
        return state.replayed is not None and state.replayed > first_lookup_at + MAX_CLOCK_DIFFERENCE

    # ---- results ----------------------------------------------------------------------------------------------

    def _settle(self, results: dict[bytes, LookupResult]) -> None:
        now = time.monotonic()
        for token, result in results.items():
            metrics.legacy_lookups.labels(outcome=result.value).inc()
            pending = self._queue.pop(token)
            if not pending.done():
                pending.set_result(result)
            if result is LookupResult.UNKNOWN:
                self._unknown[token] = now
        _trim(self._unknown)

    async def _fail(self, error: Exception) -> None:
        """Give every waiting request the result UNVERIFIED, keep the tokens queued, and pause."""
        self._failures += 1
        metrics.legacy_lookups.labels(outcome="failed").inc()
        if self._logged.acquire("", time.monotonic()).allowed:
            _log.warning("legacy.lookup_failed", error=described(error), waiting=len(self._queue))
        self._terminate()
        for token, pending in self._queue.items():
            if not pending.done():
                pending.set_result(LookupResult.UNVERIFIED)
                self._queue[token] = asyncio.get_running_loop().create_future()
        await asyncio.sleep(min(RETRY_S * 2 ** (self._failures - 1), MAX_RETRY_S))


def _trim(memory: OrderedDict[bytes, Any]) -> None:
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
