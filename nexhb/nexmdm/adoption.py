"""Identify a token that nexhb does not know but NexMDM may know, when a device first sends a heartbeat with it.

If NexMDM's database is configured, it is queried first (`lookup`). A device for which NexMDM has only a bcrypt hash is
imported with that hash. When an unknown token arrives, it is checked against these hashes; if one fits, the token
is stored for its device.

A check takes a quarter of a second. So checks run one at a time, in a thread, and only part of the time. The number of
waiting tokens is limited, both in total and for each address. A device whose token is
still being checked receives 503, never 401.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import bcrypt

from nexhb import log, metrics
from nexhb.devices import store
from nexhb.errors import DatabaseUnavailable
from nexhb.nexmdm.lookup import Lookup, LookupResult
from nexhb.postgres import sql
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import is_unavailable
from nexhb.postgres.identity import DatabaseTracker
from nexhb.postgres.kept_connection import KeptConnection
from nexhb.rate_limit import RateLimiter

_Q = sql.queries("nexmdm_import")
_log = log.get("adoption")

MAX_HINTED = 5_000  # limit of waiting tokens with a hint, the id of a device whose hash is checked first
MAX_UNHINTED = 100  # limit of waiting tokens to check against every hash
ADDRESS_PER_MINUTE = 30
MAX_REJECTED = 10_000
REJECTED_TTL_S = 3_600.0
TIMEOUT_S = 5.0
PAUSE_FACTOR = 1  # pause after a check, in multiples of its duration, so that other work gets half of the core
PAUSE_FACTOR_UNHINTED = 4  # the pause without a hint, or with a wrong one: a stranger costs a fifth of a core at most
MAX_TOKEN_BYTES = 72  # bcrypt accepts no longer token; NexMDM's tokens have 43 bytes


class TokenStatus(enum.Enum):
    """What is known about a token that is not in the token store."""

    UNKNOWN = "unknown"  # the token was checked against every hash, or there are no hashes
    PENDING = "pending"  # the token was not yet checked against every hash
    UNVERIFIED = "unverified"  # the token fits no hash, but NexMDM's database cannot be queried
    ADOPTED = "adopted"  # the token was identified just now, and the token store contains it


@dataclass(frozen=True)
class _Candidate:
    token: bytes
    token_sha256: bytes
    hint: str | None


Check = Callable[[bytes, bytes], bool]


class Adoption:
    """The daemon's identification of tokens that nexhb does not know. The coroutine `run` checks hashes."""

    def __init__(
        self,
        database: Database,
        now: Callable[[], datetime],
        check: Check = bcrypt.checkpw,
        tracker: DatabaseTracker | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._lookup = lookup
        self._tracker = tracker or DatabaseTracker()
        self._tracker.on_change(self._forget)
        self._now = now
        self._check = check
        self._conn = KeptConnection(
            database, application="nexhb adoption", command_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S
        )
        self._one_at_a_time = asyncio.Lock()
        self._hinted: OrderedDict[bytes, _Candidate] = OrderedDict()
        self._unhinted: OrderedDict[bytes, _Candidate] = OrderedDict()
        self._in_progress: set[bytes] = set()
        self._rejected: OrderedDict[bytes, tuple[float, datetime | None]] = OrderedDict()
        self._unknown: OrderedDict[bytes, float] = OrderedDict()  # kept for MISS_TTL_S
        self._by_address = RateLimiter(burst=ADDRESS_PER_MINUTE, per_second=ADDRESS_PER_MINUTE / 60)
        self._wake = asyncio.Event()

    def _forget(self) -> None:
        """Drop the results that depend on the previous database."""
        self._rejected.clear()
        self._unknown.clear()
        self._conn.terminate()

    @property
    def problem(self) -> str:
        """The reason why requests with a token that nexhb does not know receive 503 and not 401; empty while they
        receive 401."""
        return self._lookup.problem if self._lookup else ""

    async def status(self, token: str, token_sha256: bytes) -> TokenStatus:
        """Return the status of a token that is not in the token store. Raise DatabaseUnavailable."""
        now = time.monotonic()
        if now - self._unknown.get(token_sha256, float("-inf")) < store.MISS_TTL_S:
            return TokenStatus.UNKNOWN
        status = await self._determine(token, token_sha256, now)
        if status is TokenStatus.UNKNOWN:
            self._unknown[token_sha256] = now
            _trim(self._unknown, store.MAX_MISSES)
        return status

    async def _determine(self, token: str, token_sha256: bytes, now: float) -> TokenStatus:
        if not token or len(token.encode("utf-8", "surrogateescape")) > MAX_TOKEN_BYTES:
            return TokenStatus.UNKNOWN
        # An older copy of nexhb's database may lack the token's replacement or revocation, so nothing is imported.
        lookup = None if self._tracker.older_copy else self._lookup
        result = await lookup.look_up(token_sha256) if lookup else LookupResult.UNKNOWN
        waiting = (await self._fetch(_Q["waiting"], token_sha256))[0]
        if waiting["known"]:
            return TokenStatus.ADOPTED
        status = self._status_by_hashes(waiting, token_sha256, now)
        is_unverified = status is TokenStatus.UNKNOWN and result is LookupResult.UNVERIFIED
        return TokenStatus.UNVERIFIED if is_unverified else status

    def _status_by_hashes(self, waiting: asyncpg.Record, token_sha256: bytes, now: float) -> TokenStatus:
        if not waiting["hashes"]:
            return TokenStatus.UNKNOWN
        rejected = self._rejected.get(token_sha256)
        if rejected is None:
            return TokenStatus.PENDING
        at, newest = rejected
        is_stale = now - at > REJECTED_TTL_S or newest is None or newest < waiting["newest"]
        return TokenStatus.PENDING if is_stale else TokenStatus.UNKNOWN

    def may_enqueue(self, token_sha256: bytes, address: str) -> bool:
        """Return whether this token may be enqueued for a client at this address. If so, use up one permit of the
        address's rate limit. Call this before reading any of the body."""
        if self._is_enqueued(token_sha256):
            return False
        is_full = len(self._hinted) >= MAX_HINTED and len(self._unhinted) >= MAX_UNHINTED
        if is_full or not self._by_address.acquire(address, time.monotonic()).allowed:
            metrics.adoptions.labels(outcome="put_off").inc()
            return False
        return True

    def enqueue(self, token: str, token_sha256: bytes, hint: str | None) -> None:
        """Enqueue a token to be checked against hashes; drop it if the queue is full. `hint`: the device_id that the
        device claims."""
        if self._is_enqueued(token_sha256):
            return
        queue, limit = (self._hinted, MAX_HINTED) if hint else (self._unhinted, MAX_UNHINTED)
        if len(queue) >= limit:
            metrics.adoptions.labels(outcome="put_off").inc()
            return
        queue[token_sha256] = _Candidate(token.encode("utf-8", "surrogateescape"), token_sha256, hint)
        self._wake.set()

    def _is_enqueued(self, token_sha256: bytes) -> bool:
        return any(token_sha256 in tokens for tokens in (self._hinted, self._unhinted, self._in_progress))

    async def run(self) -> None:
        """Check enqueued tokens until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._drain()
            except DatabaseUnavailable as error:
                _log.warning("adoption.put_off", error=str(error))  # the device will retry
            except Exception:
                # The lookup of one unknown device must not end the daemon.
                _log.exception("adoption.failed")

    async def close(self) -> None:
        """Close the connection to nexhb's database."""
        self._conn.terminate()

    # ---- checking hashes --------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        while self._hinted or self._unhinted:
            await self._drain_hinted()
            if self._unhinted:
                with self._next(self._unhinted) as candidate:
                    await self._check_all(candidate)

    async def _drain_hinted(self) -> None:
        """Check each hinted token against its device's hash. A token that does not fit is queued to be checked against
        all hashes."""
        while self._hinted:
            with self._next(self._hinted) as candidate:
                is_adopted = await self._check_hashes(candidate, candidate.hint, PAUSE_FACTOR)
                if not is_adopted and len(self._unhinted) < MAX_UNHINTED:
                    self._unhinted[candidate.token_sha256] = candidate

    async def _check_all(self, candidate: _Candidate) -> None:
        newest = (await self._fetch(_Q["waiting"], candidate.token_sha256))[0]["newest"]
        if await self._check_hashes(candidate, None, PAUSE_FACTOR_UNHINTED):
            return
        self._rejected[candidate.token_sha256] = (time.monotonic(), newest)
        _trim(self._rejected, MAX_REJECTED)
        metrics.adoptions.labels(outcome="nobodys").inc()

    async def _check_hashes(self, candidate: _Candidate, device_id: str | None, pause_factor: int) -> bool:
        """Check a token against the hashes of one device or of all devices. If one fits, store it and return true."""
        for hashed in await self._fetch(_Q["hashes"], device_id):
            if device_id is None:
                await self._drain_hinted()  # hinted tokens must not wait for this token
            started = time.monotonic()
            fits = await asyncio.to_thread(self._fits, candidate.token, hashed["bcrypt"].encode())
            if fits:
                await self._adopt(candidate, hashed)
                return True
            await asyncio.sleep(pause_factor * (time.monotonic() - started))
        return False

    def _fits(self, token: bytes, hashed: bytes) -> bool:
        try:
            return self._check(token, hashed)
        except ValueError:  # not a bcrypt hash
            return False

    @contextmanager
    def _next(self, queue: OrderedDict[bytes, _Candidate]) -> Iterator[_Candidate]:
        token_sha256, candidate = queue.popitem(last=False)
        self._in_progress.add(token_sha256)
        try:
            yield candidate
        finally:
            self._in_progress.discard(token_sha256)

    async def _adopt(self, candidate: _Candidate, hashed: asyncpg.Record) -> None:
        adopted = await self._fetch(
            _Q["adopt"], hashed["device_no"], hashed["fingerprint"], candidate.token_sha256, self._now()
        )
        if adopted:
            metrics.adoptions.labels(outcome="adopted").inc()
            _log.info("device.adopted", device_id=hashed["device_id"])

    # ---- the database -----------------------------------------------------------------------------------------

    async def _fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._one_at_a_time:
                conn = await self._conn.get()
                epoch = self._tracker.epoch
                rows: list[asyncpg.Record] = await conn.fetch(statement, *arguments)
                self._tracker.require_epoch(epoch)
                return rows
        except Exception as error:
            self._conn.terminate()
            if not is_unavailable(error):
                raise
            raise DatabaseUnavailable(f"The token store cannot be read: {error}") from error


def _trim(memory: OrderedDict[bytes, Any], max_items: int) -> None:
    while len(memory) > max_items:
        memory.popitem(last=False)
