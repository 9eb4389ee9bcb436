"""Tokens that nexhb does not know, looked up in NexMDM's database while that lives: a device that enrolled there is
taken over with its first heartbeat, as an import would take it.

There is one connection, which only reads, one look at a time for all tokens that wait, and a rest after each. A token
is unknown only where NexMDM's database was read and does not have it; otherwise the answer is "unsure".
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

from nexhb import log, metrics, sql
from nexhb.db import Database
from nexhb.errors import DatabaseUnavailable
from nexhb.identity import Lives
from nexhb.legacy import devices
from nexhb.legacy import source as sources
from nexhb.legacy.source import Source
from nexhb.ratelimit import Allowance

_Q = sql.queries("legacy")
_log = log.get("legacy")

NAME = "legacy.source"  # in messages
AT_ONCE = 100  # tokens of one look
LINE_MOST = 1_000  # tokens that wait for a look; beyond, their devices come again
HELD_MOST = 100  # requests that wait for an answer; the others are answered at once, and their tokens stay in line
ANSWER_S = 3.0  # how long a request waits
LOOK_S = 5.0  # one look, with a new connection where there is none
REST = 3  # times as long as a look took: a quarter of one connection's time at most
RETRY_S, RETRY_MOST_S = 1.0, 30.0  # between two looks that fail
UNKNOWN_FOR_S = 60.0  # NexMDM stores a token before it hands it out, so an unknown one stays unknown
REMEMBERED = 10_000  # tokens
HASHES_AT_ONCE = 2_000  # new devices with a hash alone, taken by one look
HASHES_REMEMBERED = 200_000
CLOCKS_APART = timedelta(minutes=1)  # between a standby and its primary


class Found(enum.Enum):
    """What NexMDM's database says of a token that nexhb does not know."""

    TAKEN = "taken"  # nexhb knows it by now: its device is taken over, revoked or not
    UNKNOWN = "unknown"  # NexMDM does not know it either, or it was replaced here
    UNSURE = "unsure"  # there is no answer


class Lookup:
    """The daemon's part of it. `run` is the coroutine that asks NexMDM's database."""

    def __init__(self, dsn: str, database: Database, now: Callable[[], datetime], lives: Lives | None = None) -> None:
        self._dsn = dsn
        self._database = database
        self._now = now
        self._lives = lives or Lives()
        self._lives.on_change(self._forget)
        self._line: OrderedDict[bytes, asyncio.Future[Found]] = OrderedDict()
        self._held = 0
        self._failures = 0  # looks in a row
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._asked_at: OrderedDict[bytes, datetime] = OrderedDict()  # of a standby, by its clock
        self._hashes: set[str] = set()  # ids of devices with a hash alone that are taken already
        self._wake = asyncio.Event()
        self._opened_in: AsyncExitStack | None = None
        self._source: Source | None = None
        self._logged = Allowance(burst=5, per_second=0.02)

    def _forget(self) -> None:
        """Another database of nexhb's is there: what was taken into the one before may not be in it."""
        self._unknown.clear()
        self._hashes.clear()

    @property
    def trouble(self) -> str:
        """That NexMDM's database does not answer this daemon; empty while it does, or was not asked yet."""
        if not self._failures:
            return ""
        return f"{NAME} cannot be asked by this daemon: tokens that nexhb does not know are answered 503."

    async def ask(self, token_sha256: bytes) -> Found:
        """What NexMDM's database says of this token, within ANSWER_S."""
        if time.monotonic() - self._unknown.get(token_sha256, float("-inf")) < UNKNOWN_FOR_S:
            return Found.UNKNOWN
        answer = self._line.get(token_sha256)
        if answer is None:
            if len(self._line) >= LINE_MOST:
                metrics.legacy_lookups.labels(outcome="put_off").inc()
                return Found.UNSURE
            answer = self._line[token_sha256] = asyncio.get_running_loop().create_future()
            self._wake.set()
        if self._failures or self._held >= HELD_MOST:
            return Found.UNSURE
        self._held += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            return Found.UNSURE
        finally:
            self._held -= 1

    async def run(self) -> None:
        """Look up whatever waits, until cancelled. Never raises for what a database does."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := list(islice(self._line, AT_ONCE)):
                started = time.monotonic()
                try:
                    found = await self._look_in_time(batch)
                except Exception as error:  # not one of them may end the daemon, which serves all others
                    await self._fail(error)
                else:
                    self._failures = 0
                    self._settle(found)
                    await asyncio.sleep(REST * (time.monotonic() - started))

    def _cut(self) -> None:
        if self._source is not None:
            self._source.conn.terminate()

    async def close(self) -> None:
        """Close the connection to NexMDM's database."""
        stack, self._opened_in, self._source = self._opened_in, None, None
        if stack is not None:
            with suppress(Exception):
                await stack.aclose()

    # ---- one look ---------------------------------------------------------------------------------------------

    async def _look_in_time(self, batch: Sequence[bytes]) -> dict[bytes, Found]:
        # A rollback after the timeout would wait for a server that does not answer.
        cut = asyncio.get_running_loop().call_later(LOOK_S, self._cut)
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._look(batch)
        finally:
            cut.cancel()

    async def _look(self, batch: Sequence[bytes]) -> dict[bytes, Found]:
        life = self._lives.number
        source = await self._opened()
        # One snapshot: NexMDM stores the token_id of a device with a hash alone once that device sends a heartbeat.
        async with source.conn.transaction(isolation="repeatable_read", readonly=True):
            of = await source.standing()
            rows = await source.devices_of([token.hex() for token in batch])
            hashes, whole = await self._new_hashes(source) if of.hashes else ([], True)
        taken, refused = await self._take([*rows, *hashes], batch)
        self._lives.unless_changed(life)
        self._hashes.update(row["id"] for row in hashes)
        answers = {}
        for token in batch:
            sure = whole and token.hex() not in refused and self._is_certain(token, of)
            answers[token] = Found.TAKEN if token in taken else Found.UNKNOWN if sure else Found.UNSURE
        return answers

    async def _opened(self) -> Source:
        if self._source is None or self._source.conn.is_closed():
            await self.close()
            stack = AsyncExitStack()
            opening = sources.opened(
                self._dsn, name=NAME, application="nexhb look-up", timeout_s=LOOK_S, for_history=False
            )
            self._source = await stack.enter_async_context(opening)
            self._opened_in = stack
        return self._source

    async def _new_hashes(self, source: Source) -> tuple[list[Record], bool]:
        """Devices with a hash alone that were not taken yet, and whether these are all of them."""
        found: list[Record] = []
        if len(self._hashes) > HASHES_REMEMBERED:
            self._hashes.clear()
        async for page in source.devices(hashes_alone=True):
            found += [row for row in page if row["id"] not in self._hashes]
            if len(found) > HASHES_AT_ONCE:
                return found[:HASHES_AT_ONCE], False
        return found, True

    async def _take(self, rows: list[Record], batch: Sequence[bytes]) -> tuple[set[bytes], set[str]]:
        """Take these devices over as an import does. The tokens of the batch that nexhb knows now, and the token_ids of
        devices that it cannot have."""
        if not rows:
            return set(), set()
        if self._lives.older:
            raise DatabaseUnavailable(self._lives.older)
        connected = self._database.connected(
            application="nexhb taking over", command_timeout_s=LOOK_S, lock_timeout="3000"
        )
        async with connected as conn:
            made = await devices.take_rows(conn, rows, self._now(), self._source.name if self._source else "")
            known = {row["token_sha256"] for row in await conn.fetch(_Q["known_tokens"], list(batch))}
        refused = {row["token_id"] for row in rows if row["id"] in made.not_taken}
        token_ids = {token.hex() for token in known}
        for row in rows:
            if row["token_id"] in token_ids:
                _log.info("device.taken_over", device_id=row["id"], revoked=row["token_revoked_at"] is not None)
            elif row["token_id"] is not None:
                _log.warning("device.not_taken_over", device_id=row["id"], why=_why_not(row, refused))
        return known, refused

    def _is_certain(self, token: bytes, of: sources.Standing) -> bool:
        """Whether a token that is not there is unknown. A standby shows that only once it has replayed a commit that is
        later than the first heartbeat with the token."""
        if not of.standby:
            return True
        asked_at = self._asked_at.setdefault(token, of.clock)
        _trim(self._asked_at)
        return of.replayed is not None and of.replayed > asked_at + CLOCKS_APART

    # ---- what comes of it -------------------------------------------------------------------------------------

    def _settle(self, found: dict[bytes, Found]) -> None:
        now = time.monotonic()
        for token, what in found.items():
            metrics.legacy_lookups.labels(outcome=what.value).inc()
            answer = self._line.pop(token)
            if not answer.done():
                answer.set_result(what)
            if what is Found.UNKNOWN:
                self._unknown[token] = now
        _trim(self._unknown)

    async def _fail(self, error: Exception) -> None:
        """Whoever waits is told to come again; his token stays in line."""
        self._failures += 1
        metrics.legacy_lookups.labels(outcome="failed").inc()
        if not self._logged.take("", time.monotonic()):
            _log.warning("legacy.lookup_failed", error=f"{type(error).__name__}: {error}", waiting=len(self._line))
        self._cut()
        for token, answer in self._line.items():
            if not answer.done():
                answer.set_result(Found.UNSURE)
                self._line[token] = asyncio.get_running_loop().create_future()
        await asyncio.sleep(min(RETRY_S * 2 ** (self._failures - 1), RETRY_MOST_S))


def _why_not(row: Record, refused: set[str]) -> str:
    return "its id is none here" if row["token_id"] in refused else "the token was replaced here"


def _trim(memory: OrderedDict[bytes, Any]) -> None:
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
