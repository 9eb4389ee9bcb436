"""Tokens that nexhb does not know and NexMDM may: whose they are is found out with their first heartbeat.

Where NexMDM's database is configured, it is asked first (`lookup`). A device of which NexMDM keeps nothing but a bcrypt
hash is taken over with that hash, and found by trying it.

A hash takes a quarter of a second, so they are tried one at a time, in a thread, and for a part of the time only; who
waits for it is bounded, in all and by address. Whoever waits is told to come again: never 401 while his answer is open.
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

from nexhb import devices, log, metrics, sql
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable
from nexhb.identity import Lives
from nexhb.legacy.lookup import Found, Lookup
from nexhb.pgerrors import is_unavailable
from nexhb.ratelimit import Allowance

_Q = sql.queries("legacy")
_log = log.get("adoption")

HINTED_MOST = 5_000  # who names a device that waits: one hash each
UNHINTED_MOST = 100  # for whom every hash is tried
OF_AN_ADDRESS = 30  # a minute
REFUSED_HELD = 10_000
REFUSED_FOR_S = 3_600.0
TIMEOUT_S = 5.0
PAUSE = 1  # times as long as a hash took, for everything else that the machine has to do
PAUSE_UNHINTED = 4  # for who says nothing of himself, or nothing true: a stranger costs a fifth of a core at most
LONGEST_TOKEN = 72  # bytes; bcrypt refuses more, and NexMDM's have 43


class Standing(enum.Enum):
    """Whose a token is that the token store does not know."""

    NOBODYS = "nobody's"  # every hash was really tried, or none waits
    OPEN = "open"  # it may be that of one
    UNSURE = "unsure"  # it is that of none, and NexMDM's database does not answer
    ADOPTED = "adopted"  # a moment ago: the store will know it when it is asked again


@dataclass(frozen=True)
class _Asked:
    token: bytes
    token_sha256: bytes
    hint: str | None


Check = Callable[[bytes, bytes], bool]


class Adoption:
    """The daemon's part of it. `run` is the coroutine that tries."""

    def __init__(
        self,
        database: Database,
        now: Callable[[], datetime],
        check: Check = bcrypt.checkpw,
        lives: Lives | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._lookup = lookup
        self._database = database
        self._lives = lives or Lives()
        self._lives.on_change(self._forget)
        self._now = now
        self._check = check
        self._conn: Connection | None = None
        self._one_at_a_time = asyncio.Lock()
        self._hinted: OrderedDict[bytes, _Asked] = OrderedDict()
        self._unhinted: OrderedDict[bytes, _Asked] = OrderedDict()
        self._trying: set[bytes] = set()
        self._refused: OrderedDict[bytes, tuple[float, datetime | None]] = OrderedDict()
        self._nobodys: OrderedDict[bytes, float] = OrderedDict()  # for a moment, as the token store remembers it
        self._by_address = Allowance(burst=OF_AN_ADDRESS, per_second=OF_AN_ADDRESS / 60)
        self._wake = asyncio.Event()

    def _forget(self) -> None:
        """Another database is there: what was found out of the one before does not hold."""
        self._refused.clear()
        self._nobodys.clear()
        if self._conn is not None:
            self._conn.terminate()

    @property
    def trouble(self) -> str:
        """Why tokens that nexhb does not know are not answered 401; empty where they are."""
        return self._lookup.trouble if self._lookup else ""

    async def standing(self, token: str, token_sha256: bytes) -> Standing:
        """What is to be said to an unknown token. Raises DatabaseUnavailable."""
        now = time.monotonic()
        if now - self._nobodys.get(token_sha256, float("-inf")) < devices.MISS_HOLDS_S:
            return Standing.NOBODYS
        found = await self._looked_up(token, token_sha256, now)
        if found is Standing.NOBODYS:
            self._nobodys[token_sha256] = now
            _trim(self._nobodys, devices.MISSES_HELD)
        return found

    async def _looked_up(self, token: str, token_sha256: bytes, now: float) -> Standing:
        if not token or len(token.encode("utf-8", "surrogateescape")) > LONGEST_TOKEN:
            return Standing.NOBODYS
        # An older copy of nexhb's database may lack that the token was replaced or revoked here: nobody is taken over.
        asks = self._lookup is not None and not self._lives.older
        found = await self._lookup.ask(token_sha256) if self._lookup and asks else Found.UNKNOWN
        waiting = (await self._fetch(_Q["waiting"], token_sha256))[0]
        if waiting["known"]:
            return Standing.ADOPTED
        standing = self._among_hashes(waiting, token_sha256, now)
        return Standing.UNSURE if standing is Standing.NOBODYS and found is Found.UNSURE else standing

    def _among_hashes(self, waiting: asyncpg.Record, token_sha256: bytes, now: float) -> Standing:
        if not waiting["hashes"]:
            return Standing.NOBODYS
        refused = self._refused.get(token_sha256)
        if refused is None:
            return Standing.OPEN
        when, newest = refused
        stale = now - when > REFUSED_FOR_S or newest is None or newest < waiting["newest"]
        return Standing.OPEN if stale else Standing.NOBODYS

    def admits(self, token_sha256: bytes, address: str) -> bool:
        """Whether this token may be asked for now, by somebody at this address; his allowance is taken with it. Called
        before anything of a body is read."""
        if self._is_asked(token_sha256):
            return False
        full = len(self._hinted) >= HINTED_MOST and len(self._unhinted) >= UNHINTED_MOST
        if full or self._by_address.take(address, time.monotonic()):
            metrics.adoptions.labels(outcome="put_off").inc()
            return False
        return True

    def ask(self, token: str, token_sha256: bytes, hint: str | None) -> None:
        """Try it, as soon as its turn comes; forgotten where too many wait. `hint`: the device_id that it claims."""
        if self._is_asked(token_sha256):
            return
        lane, most = (self._hinted, HINTED_MOST) if hint else (self._unhinted, UNHINTED_MOST)
        if len(lane) >= most:
            metrics.adoptions.labels(outcome="put_off").inc()
            return
        lane[token_sha256] = _Asked(token.encode("utf-8", "surrogateescape"), token_sha256, hint)
        self._wake.set()

    def _is_asked(self, token_sha256: bytes) -> bool:
        return any(token_sha256 in one for one in (self._hinted, self._unhinted, self._trying))

    async def run(self) -> None:
        """Try whatever was asked, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._empty()
            except DatabaseUnavailable as error:
                _log.warning("adoption.put_off", error=str(error))  # who was asked for comes again
            except Exception:
                # Nobody knows what to do about this one; a daemon must not end for a device that is not known yet.
                _log.exception("adoption.failed")

    async def close(self) -> None:
        """Close its connection."""
        if self._conn is not None:
            self._conn.terminate()

    # ---- trying -----------------------------------------------------------------------------------------------

    async def _empty(self) -> None:
        while self._hinted or self._unhinted:
            await self._empty_hinted()
            if self._unhinted:
                with self._taken_from(self._unhinted) as asked:
                    await self._try_all(asked)

    async def _empty_hinted(self) -> None:
        """Those that name their device: one hash each. Where it was not that one, all of them, behind the others."""
        while self._hinted:
            with self._taken_from(self._hinted) as asked:
                if not await self._try(asked, asked.hint, PAUSE) and len(self._unhinted) < UNHINTED_MOST:
                    self._unhinted[asked.token_sha256] = asked

    async def _try_all(self, asked: _Asked) -> None:
        newest = (await self._fetch(_Q["waiting"], asked.token_sha256))[0]["newest"]
        if await self._try(asked, None, PAUSE_UNHINTED):
            return
        self._refused[asked.token_sha256] = (time.monotonic(), newest)
        _trim(self._refused, REFUSED_HELD)
        metrics.adoptions.labels(outcome="nobodys").inc()

    async def _try(self, asked: _Asked, device_id: str | None, pause: int) -> bool:
        """Each hash of a device, or of all; True where one of them fitted."""
        for hashed in await self._fetch(_Q["hashes"], device_id):
            if device_id is None:
                await self._empty_hinted()  # they do not wait behind somebody of whom nothing is known
            started = time.monotonic()
            fits = await asyncio.to_thread(self._fits, asked.token, hashed["bcrypt"].encode())
            if fits:
                await self._adopt(asked, hashed)
                return True
            await asyncio.sleep(pause * (time.monotonic() - started))
        return False

    def _fits(self, token: bytes, hashed: bytes) -> bool:
        try:
            return self._check(token, hashed)
        except ValueError:  # no hash of bcrypt's: nobody's
            return False

    @contextmanager
    def _taken_from(self, lane: OrderedDict[bytes, _Asked]) -> Iterator[_Asked]:
        token_sha256, asked = lane.popitem(last=False)
        self._trying.add(token_sha256)
        try:
            yield asked
        finally:
            self._trying.discard(token_sha256)

    async def _adopt(self, asked: _Asked, hashed: asyncpg.Record) -> None:
        found = await self._fetch(
            _Q["adopt"], hashed["device_no"], hashed["fingerprint"], asked.token_sha256, self._now()
        )
        if found:
            metrics.adoptions.labels(outcome="adopted").inc()
            _log.info("device.adopted", device_id=hashed["device_id"])

    # ---- the database -----------------------------------------------------------------------------------------

    async def _fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._one_at_a_time:
                if self._conn is None or self._conn.is_closed():
                    self._conn = await self._database.connect(
                        application="nexhb adoption", command_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S
                    )
                life = self._lives.number
                rows: list[asyncpg.Record] = await self._conn.fetch(statement, *arguments)
                self._lives.unless_changed(life)
                return rows
        except Exception as error:
            if self._conn is not None:
                self._conn.terminate()
            if not is_unavailable(error):
                raise
            raise DatabaseUnavailable(f"The token store cannot be read: {error}") from error


def _trim(memory: OrderedDict[bytes, Any], most: int) -> None:
    while len(memory) > most:
        memory.popitem(last=False)
