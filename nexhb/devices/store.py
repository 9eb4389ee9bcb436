"""Map device tokens to devices, in memory. LISTEN and a slow refresh keep the memory current."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import asyncpg

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable, described
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.identity import DatabaseTracker
from nexhb.postgres.kept_connection import KeptConnection

_Q = sql.queries("devices")
_log = log.get("devices")

CHANNEL = "nexhb_devices"
MAX_MISSES = 10_000  # unknown tokens remembered for MISS_TTL_S, to save one query for each request with them
MISS_TTL_S = 2.0
ROWS_PER_FETCH = 1_000  # tokens in one fetch, which blocks the event loop for 2 to 4 ms
LOOKUP_TIMEOUT_S = 5.0  # includes the wait until other look-ups have ended
# A change is in force within 5 s even if its notification was lost or the listener's session hangs. The 5 s are
# the interval of polls (1 s), the timeout of a poll (2 s), and the time to connect again and read the store again. A
# notification counts as lost if two polls in a row see its change before it arrives.
POLL_S = 1.0
RESPONSE_TIMEOUT_S = 2.0
RECONNECT_S = 0.5
_CONNECTION_LOST = "lost"


class Device(NamedTuple):
    """The device that a token belongs to."""

    device_no: int
    device_id: str
    revoked: bool
    epoch: int = 0  # DatabaseTracker.epoch when this device was read


class DeviceStore:
    """The daemon's in-memory copy of the token store.

    A token that is not in memory is looked up in the database before a 401 is returned: a device that receives 401 five
    times erases its credentials.
    """

    def __init__(self, database: Database, *, refresh_s: float, tracker: DatabaseTracker | None = None) -> None:
        self._database = database
        self._tracker = tracker or DatabaseTracker()
        self._tracker.on_change(self._clear)
        self._refresh_s = refresh_s
        self._by_hash: dict[bytes, Device] = {}
        self._misses: OrderedDict[bytes, float] = OrderedDict()
        self._lookup_conn = KeptConnection(
            database, application="nexhb token look-up", command_timeout_s=5, timeout_s=5
        )
        self._lookup_lock = asyncio.Lock()
        self._follow_conn: Connection | None = None
        self._is_following = False  # whether notifications arrive; only then is a remembered miss valid
        self._changed: asyncio.Queue[str] = asyncio.Queue()
        self._changes_applied = 0  # the number of token changes that are applied to memory

    def cached(self, token_hash: bytes) -> Device | None:
        """Return the device if the token is in memory, without I/O."""
        return self._by_hash.get(token_hash)

    async def look_up(self, token_hash: bytes) -> Device | None:
        """Return the device from memory or else from the database; None if the database does not know the token.
        Raise DatabaseUnavailable if the database cannot be read."""
        if device := self._by_hash.get(token_hash):
            return device
        now = asyncio.get_running_loop().time()
        missed = self._misses.get(token_hash)
        if missed is not None and self._is_following and now - missed < MISS_TTL_S:
            return None
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S), self._lookup_lock:
                await self._fetch_tokens([token_hash])
        except TimeoutError as error:
            raise DatabaseUnavailable("The token store does not respond.") from error
        device = self._by_hash.get(token_hash)
        if device is None:
            self._misses[token_hash] = now
            while len(self._misses) > MAX_MISSES:
                self._misses.popitem(last=False)
        return device

    def forget_miss(self, token_hash: bytes) -> None:
        """Drop the remembered miss of a token: the token has been identified since."""
        self._misses.pop(token_hash, None)

    def is_current(self, device: Device) -> bool:
        """Return whether the device was read from the database that the daemon works with now."""
        return device.epoch == self._tracker.epoch

    async def load(self) -> None:
        """Read the whole token store. Raise DatabaseUnavailable."""
        async with self._database.connected(application="nexhb devices") as conn:
            await self._read_all(conn, "start")

    async def run(self) -> None:
        """Keep memory current until cancelled: apply notifications at once, check the number of changes every second,
        and read the whole store again every `refresh_s` seconds."""
        while True:
            try:
                await self._follow()
            except FROM_THE_DATABASE as error:
                metrics.device_refreshes.labels(why="listen", status="failed").inc()
                _log.warning("devices.listen_lost", error=described(error))
                await asyncio.sleep(RECONNECT_S)

    async def close(self) -> None:
        """Close the connection for look-ups."""
        self._lookup_conn.terminate()

    def _clear(self) -> None:
        """Drop everything that was read from the previous database: the new database may have other tokens."""
        self._by_hash = {}
        self._misses.clear()
        metrics.devices_known.set(0)
        self._lookup_conn.terminate()
        if self._follow_conn is not None:
            self._follow_conn.terminate()

    async def _follow(self) -> None:
        conn = await self._database.connect(application="nexhb devices", timeout_s=RESPONSE_TIMEOUT_S)
        changed: asyncio.Queue[str] = asyncio.Queue()  # per connection: the end of an old connection must not count
        self._changed, self._follow_conn = changed, conn
        try:
            conn.add_termination_listener(lambda _: changed.put_nowait(_CONNECTION_LOST))
            with _response_deadline(conn):
                await conn.add_listener(CHANNEL, lambda *args: changed.put_nowait(str(args[3])))
            # This connection received no notification of changes made before LISTEN took effect.
            await self._read_all(conn, "listen")
            self._is_following = True
            await self._stay_current(conn, changed)
        finally:
            self._is_following, self._follow_conn = False, None
            with suppress(Exception):
                await conn.close(timeout=2)

    async def _stay_current(self, conn: Connection, changed: asyncio.Queue[str]) -> None:
        loop = asyncio.get_running_loop()
        poll_at, refresh_at = loop.time() + POLL_S, loop.time() + self._refresh_s
        is_behind = False
        while True:
            payload = await _next_notification(changed, poll_at)
            if payload == _CONNECTION_LOST:
                raise DatabaseUnavailable("The connection that listens was closed.")
            if payload is not None:
                await self._apply_notification(conn, payload)
                continue
            poll_at = loop.time() + POLL_S
            was_behind, is_behind = is_behind, await self._is_behind(conn)
            if loop.time() >= refresh_at or (was_behind and is_behind):
                await self._read_all(conn, "refresh" if loop.time() >= refresh_at else "missed")
                refresh_at, is_behind = loop.time() + self._refresh_s, False

    async def _is_behind(self, conn: Connection) -> bool:
        """Return whether a token has changed without a notification so far; the notification may still arrive.

        Also check whether the database was replaced, since a restore into the same database ends no connection.
        """
        with _response_deadline(conn):
            await self._tracker.check(conn)
            changes = await conn.fetchval(_Q["token_changes"])
        self._tracker.note_changes(changes)
        return bool(changes != self._changes_applied)

    async def _apply_notification(self, conn: Connection, payload: str) -> None:
        if not payload:
            await self._read_all(conn, "notify")
            return
        hashes = [bytes.fromhex(text) for text in payload.split(",")]
        epoch = self._tracker.epoch
        with _response_deadline(conn):
            rows = await conn.fetch(_Q["find_tokens"], hashes)
        self._tracker.require_epoch(epoch)
        self._note_changes(rows)
        devices = {row["token_sha256"]: _device(row, epoch) for row in rows}
        for token_hash in hashes:
            if device := devices.get(token_hash):
                self._by_hash[token_hash] = device
            else:
                self._by_hash.pop(token_hash, None)
        self._changes_applied += 1
        self._tracker.note_devices(device[:2] for device in devices.values())
        metrics.devices_known.set(len(self._by_hash))
        metrics.device_refreshes.labels(why="notify", status="ok").inc()

    async def _read_all(self, conn: Connection, why: str) -> None:
        """Read the whole store in one snapshot.

        Half a million tokens take seconds, so they are fetched in pieces, and heartbeats are served in between. The
        dictionary is updated in place, because freeing a dictionary of that size blocks the event loop too.
        Notifications of changes made during the read arrive after it. After an error, the caller must close the
        connection, whose transaction is still open.
        """
        seen: set[bytes] = set()
        epoch = self._tracker.epoch
        transaction = conn.transaction(isolation="repeatable_read")
        with _response_deadline(conn):
            await transaction.start()
            # If the notification of a change arrives later, the change is counted twice: that costs one more full read.
            changes = await conn.fetchval(_Q["token_changes"])
            cursor = await conn.cursor(_Q["all_tokens"])
        while rows := await _fetch_rows(conn, cursor):
            self._tracker.require_epoch(epoch)
            self._cache(rows, epoch, seen)
        with _response_deadline(conn):
            await transaction.commit()
        self._tracker.require_epoch(epoch)
        if len(self._by_hash) > len(seen):
            for token_hash in self._by_hash.keys() - seen:
                del self._by_hash[token_hash]
        self._changes_applied = changes
        self._tracker.note_changes(changes)
        metrics.devices_known.set(len(self._by_hash))
        metrics.device_refreshes.labels(why=why, status="ok").inc()

    def _cache(self, rows: Iterable[asyncpg.Record], epoch: int, seen: set[bytes]) -> None:
        new = []
        for row in rows:
            token_hash, device = row["token_sha256"], _device(row, epoch)
            seen.add(token_hash)
            if self._by_hash.get(token_hash) != device:
                self._by_hash[token_hash] = device
                new.append(device)
        self._tracker.note_devices(device[:2] for device in new)

    async def _fetch_tokens(self, hashes: list[bytes]) -> None:
        try:
            conn = await self._lookup_conn.get()
            epoch = self._tracker.epoch
            rows = await conn.fetch(_Q["find_tokens"], hashes)
            self._tracker.require_epoch(epoch)
        except (*FROM_THE_DATABASE, asyncio.CancelledError) as error:
            self._lookup_conn.terminate()  # otherwise the next look-up would wait for the response to this look-up
            if isinstance(error, asyncio.CancelledError):
                raise
            raise DatabaseUnavailable(f"The token store cannot be read: {error}") from error
        self._note_changes(rows)
        self._cache(rows, epoch, set())

    def _note_changes(self, rows: Sequence[asyncpg.Record]) -> None:
        if rows:
            self._tracker.note_changes(rows[0]["changes"])


@contextmanager
def _response_deadline(conn: Connection) -> Iterator[None]:
    """Terminate the connection if the block takes longer than RESPONSE_TIMEOUT_S. Cancelling the query or rolling back
    would wait for the same server."""
    timer = asyncio.get_running_loop().call_later(RESPONSE_TIMEOUT_S, conn.terminate)
    try:
        yield
    finally:
        timer.cancel()


async def _fetch_rows(conn: Connection, cursor: Any) -> list[asyncpg.Record]:
    with _response_deadline(conn):
        rows: list[asyncpg.Record] = await cursor.fetch(ROWS_PER_FETCH)
    return rows


async def _next_notification(changed: asyncio.Queue[str], until: float) -> str | None:
    """Return the payload of the next notification, or None if there is none before `until` (by the loop's clock)."""
    try:
        async with asyncio.timeout_at(until):
            return await changed.get()
    except TimeoutError:
        return None


def _device(row: asyncpg.Record, epoch: int) -> Device:
    return Device(row["device_no"], row["device_id"], row["revoked"], epoch)
