"""Who may send: tokens (SHA-256 at rest) → devices, held in memory, kept fresh by LISTEN and by a slow refresh."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg

from nexhb import devicefile, log, metrics, sql
from nexhb.db import Connection, Database, lasting
from nexhb.errors import BadInput, DatabaseUnavailable, DeviceExists, EnrolmentRefused, UnknownDevice
from nexhb.identity import Lives
from nexhb.pgerrors import FROM_THE_DATABASE
from nexhb.texts import quoted, shown, unfit

_Q = sql.queries("devices")
_log = log.get("devices")

CHANNEL = "nexhb_devices"
MISSES_HELD = 10_000  # unknown tokens remembered for a moment, so that a stray device costs no query a heartbeat
MISS_HOLDS_S = 2.0
READ_AT_ONCE = 1_000  # tokens; the loop is held for 2 to 4 ms
LOOKUP_TIMEOUT_S = 5.0  # the wait for others' look-ups included
LINES_NAMED = 20  # of those that are wrong in a file
# A change is in force 5 s later at most, also where its notification was lost or the listener's session hangs: a look
# (1 s), an answer that does not come (2 s), a new connection, and the store read again. A change that is seen at two
# looks in a row, and not notified meanwhile, was missed.
LOOK_S = 1.0
ANSWER_S = 2.0
RECONNECT_S = 0.5
_LOST = "lost"
RESERVED = ("offline", "unity-down")  # GET /v1/devices/offline is a list, not a device


class Device(NamedTuple):
    """Whose token it is."""

    device_no: int
    device_id: str
    revoked: bool
    life: int = 0  # Lives.number when it was read


def new_token() -> str:
    """32 random bytes, URL-safe base64 without padding: what the agent carries."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def hash_token(token: str) -> bytes:
    """What is stored and looked up (NexMDM calls its hex form token_id)."""
    # What a header held that is no UTF-8 arrives as surrogates: it is nobody's token, and no error.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class DeviceStore:
    """The daemon's memory of the token store.

    A token that memory does not know is asked of the database before anybody is told 401: a device that hears 401
    five times erases its credentials.
    """

    def __init__(self, database: Database, *, refresh_s: float, lives: Lives | None = None) -> None:
        self._database = database
        self._lives = lives or Lives()
        self._lives.on_change(self._forget)
        self._refresh_s = refresh_s
        self._by_hash: dict[bytes, Device] = {}
        self._misses: OrderedDict[bytes, float] = OrderedDict()
        self._lookup_conn: Connection | None = None
        self._lookup_lock = asyncio.Lock()
        self._follow_conn: Connection | None = None
        self._is_following = False  # else nobody says that a token is known since
        self._changed: asyncio.Queue[str] = asyncio.Queue()
        self._counted = 0  # changes of tokens that memory has, as far as it can be told

    def known(self, token_hash: bytes) -> Device | None:
        """The device, if memory knows the token. Takes no time."""
        return self._by_hash.get(token_hash)

    async def find(self, token_hash: bytes) -> Device | None:
        """The device, by the database where memory does not know the token; None: the store was read, and it is in
        nobody's hands. Raises DatabaseUnavailable where the store could not be read."""
        if device := self._by_hash.get(token_hash):
            return device
        now = asyncio.get_running_loop().time()
        missed = self._misses.get(token_hash)
        if missed is not None and self._is_following and now - missed < MISS_HOLDS_S:
            return None
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S), self._lookup_lock:
                await self._read([token_hash])
        except TimeoutError as error:
            raise DatabaseUnavailable("The token store does not answer.") from error
        device = self._by_hash.get(token_hash)
        if device is None:
            self._misses[token_hash] = now
            while len(self._misses) > MISSES_HELD:
                self._misses.popitem(last=False)
        return device

    def forget_miss(self, token_hash: bytes) -> None:
        """That the token was unknown a moment ago does not count any more: its device was taken over since."""
        self._misses.pop(token_hash, None)

    def is_current(self, device: Device) -> bool:
        """Whether the device was read from the database that is there now."""
        return device.life == self._lives.number

    async def load(self) -> None:
        """Read the whole store. Raises DatabaseUnavailable."""
        async with self._database.connected(application="nexhb devices") as conn:
            await self._read_all(conn, "start")

    async def run(self) -> None:
        """Follow the store until cancelled: notifications at once, the count of changes every second, everything again
        every refresh_s."""
        while True:
            try:
                await self._follow()
            except FROM_THE_DATABASE as error:
                metrics.device_refreshes.labels(why="listen", status="failed").inc()
                _log.warning("devices.listen_lost", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(RECONNECT_S)

    async def close(self) -> None:
        """Close the connection for look-ups."""
        if self._lookup_conn is not None:
            self._lookup_conn.terminate()

    def _forget(self) -> None:
        """Another database is there: a token that was learned from the one before proves nothing."""
        self._by_hash = {}
        self._misses.clear()
        metrics.devices_known.set(0)
        for conn in (self._lookup_conn, self._follow_conn):
            if conn is not None:
                conn.terminate()

    async def _follow(self) -> None:
        conn = await self._database.connect(application="nexhb devices", timeout_s=ANSWER_S)
        changed: asyncio.Queue[str] = asyncio.Queue()  # of this connection alone: its end must not end the next one
        self._changed, self._follow_conn = changed, conn
        try:
            conn.add_termination_listener(lambda _: changed.put_nowait(_LOST))
            with _answered(conn):
                await conn.add_listener(CHANNEL, lambda *args: changed.put_nowait(str(args[3])))
            # What changed while nobody listened was not notified.
            await self._read_all(conn, "listen")
            self._is_following = True
            await self._stay_current(conn, changed)
        finally:
            self._is_following, self._follow_conn = False, None
            with suppress(Exception):
                await conn.close(timeout=2)

    async def _stay_current(self, conn: Connection, changed: asyncio.Queue[str]) -> None:
        loop = asyncio.get_running_loop()
        look_at, refresh_at = loop.time() + LOOK_S, loop.time() + self._refresh_s
        behind = False
        while True:
            payload = await _next(changed, look_at)
            if payload == _LOST:
                raise DatabaseUnavailable("The connection that listens was closed.")
            if payload is not None:
                await self._take_notice(conn, payload)
                continue
            look_at = loop.time() + LOOK_S
            was_behind, behind = behind, await self._is_behind(conn)
            if loop.time() >= refresh_at or (was_behind and behind):
                await self._read_all(conn, "refresh" if loop.time() >= refresh_at else "missed")
                refresh_at, behind = loop.time() + self._refresh_s, False

    async def _is_behind(self, conn: Connection) -> bool:
        """Whether a token has changed of which no notification has come; the notification may still be on its way. A
        restore into this very database ends no connection: so it is looked at again, too."""
        with _answered(conn):
            await self._lives.check(conn)
            changes = await conn.fetchval(_Q["token_changes"])
        self._lives.counted(changes)
        return bool(changes != self._counted)

    async def _take_notice(self, conn: Connection, payload: str) -> None:
        if not payload:
            await self._read_all(conn, "notify")
            return
        hashes = [bytes.fromhex(text) for text in payload.split(",")]
        life = self._lives.number
        with _answered(conn):
            rows = await conn.fetch(_Q["find_tokens"], hashes)
        self._lives.unless_changed(life)
        self._note_changes(rows)
        found = {row["token_sha256"]: _device(row, life) for row in rows}
        for token_hash in hashes:
            if device := found.get(token_hash):
                self._by_hash[token_hash] = device
            else:
                self._by_hash.pop(token_hash, None)
        self._counted += 1
        self._lives.learned(device[:2] for device in found.values())
        metrics.devices_known.set(len(self._by_hash))
        metrics.device_refreshes.labels(why="notify", status="ok").inc()

    async def _read_all(self, conn: Connection, why: str) -> None:
        """In one snapshot and in pieces, between which heartbeats are served: half a million tokens take seconds. In
        place, because to free as many at once holds the loop too. What changes meanwhile is notified at the end. After
        an error the connection must be closed: its transaction is still open."""
        seen: set[bytes] = set()
        life = self._lives.number
        transaction = conn.transaction(isolation="repeatable_read")
        with _answered(conn):
            await transaction.start()
            # A change whose notification is still to come is counted again, which costs another reading at most.
            counted = await conn.fetchval(_Q["token_changes"])
            cursor = await conn.cursor(_Q["all_tokens"])
        while rows := await _piece(conn, cursor):
            self._lives.unless_changed(life)
            self._take_in(rows, life, seen)
        with _answered(conn):
            await transaction.commit()
        self._lives.unless_changed(life)
        if len(self._by_hash) > len(seen):
            for token_hash in self._by_hash.keys() - seen:
                del self._by_hash[token_hash]
        self._counted = counted
        self._lives.counted(counted)
        metrics.devices_known.set(len(self._by_hash))
        metrics.device_refreshes.labels(why=why, status="ok").inc()

    def _take_in(self, rows: Iterable[asyncpg.Record], life: int, seen: set[bytes]) -> None:
        new = []
        for row in rows:
            token_hash, device = row["token_sha256"], _device(row, life)
            seen.add(token_hash)
            if self._by_hash.get(token_hash) != device:
                self._by_hash[token_hash] = device
                new.append(device)
        self._lives.learned(device[:2] for device in new)

    async def _read(self, hashes: list[bytes]) -> None:
        try:
            if self._lookup_conn is None or self._lookup_conn.is_closed():
                self._lookup_conn = await self._database.connect(
                    application="nexhb token look-up", command_timeout_s=5, timeout_s=5
                )
            life = self._lives.number
            rows = await self._lookup_conn.fetch(_Q["find_tokens"], hashes)
            self._lives.unless_changed(life)
        except (*FROM_THE_DATABASE, asyncio.CancelledError) as error:
            if self._lookup_conn is not None:
                self._lookup_conn.terminate()  # the next look-up would wait for the answer to this one
            if isinstance(error, asyncio.CancelledError):
                raise
            raise DatabaseUnavailable(f"The token store cannot be read: {error}") from error
        self._note_changes(rows)
        self._take_in(rows, life, set())

    def _note_changes(self, rows: Sequence[asyncpg.Record]) -> None:
        if rows:
            self._lives.counted(rows[0]["changes"])


@contextmanager
def _answered(conn: Connection) -> Iterator[None]:
    """A connection that has not answered by the end of ANSWER_S is lost: to cancel, or to roll back, would wait for its
    answer too."""
    timer = asyncio.get_running_loop().call_later(ANSWER_S, conn.terminate)
    try:
        yield
    finally:
        timer.cancel()


async def _piece(conn: Connection, cursor: Any) -> list[asyncpg.Record]:
    with _answered(conn):
        rows: list[asyncpg.Record] = await cursor.fetch(READ_AT_ONCE)
    return rows


async def _next(changed: asyncio.Queue[str], until: float) -> str | None:
    """What is notified next; None where nothing is until then (the loop's clock)."""
    try:
        async with asyncio.timeout_at(until):
            return await changed.get()
    except TimeoutError:
        return None


def _device(row: asyncpg.Record, life: int) -> Device:
    return Device(row["device_no"], row["device_id"], row["revoked"], life)


# ---- changes: each in one transaction; every daemon hears of it by NOTIFY ---------------------------------------


async def add(conn: Connection, device_id: str, alias: str | None) -> str:
    """A new device; its token, which is shown this once. Raises DeviceExists, BadInput."""
    _check_device_id(device_id)
    if alias is not None:
        _check_text(alias, "alias", 200)
    token = new_token()
    async with lasting(conn):
        device_no = await conn.fetchval(_Q["add_device"], device_id, alias)
        if device_no is None:
            raise DeviceExists(
                f"{quoted(device_id)} is taken.", hint="`nexhb devices rotate` gives a known device a new token."
            )
        await conn.execute(_Q["add_token"], hash_token(token), device_no)
    return token


async def rotate(conn: Connection, device_id: str) -> str:
    """A new token for a known device; the old ones stop working, and a revoked device is admitted again.

    Raises UnknownDevice.
    """
    token = new_token()
    async with lasting(conn):
        device_no = await _device_no(conn, device_id)
        await conn.execute(_Q["mark_rotated"], device_no)
        await conn.execute(_Q["drop_tokens"], device_no)
        await conn.execute(_Q["forget_legacy"], device_no)
        await conn.execute(_Q["end_enrolment"], device_no)
        await conn.execute(_Q["part_twins"], device_no)
        await conn.execute(_Q["add_token"], hash_token(token), device_no)
        await conn.execute(_Q["readmit_device"], device_no)
    return token


async def revoke(conn: Connection, device_id: str, now: datetime) -> None:
    """Its heartbeats are answered 410 from now on, and it no longer counts. Raises UnknownDevice."""
    async with lasting(conn):
        device_no = await _device_no(conn, device_id)
        since = await conn.fetchval(_Q["revoke_device"], device_no, now)
        await conn.execute(_Q["end_enrolment"], device_no)
        await conn.execute(_Q["revoke_tokens"], device_no, since)


class Readmitted(NamedTuple):
    """What a readmission found."""

    was_revoked: bool
    tokens: int  # with which it may come now


async def readmit(conn: Connection, device_id: str) -> Readmitted:
    """A revocation taken back, with the tokens that it took: the device goes on with its own, and nobody visits it.

    A device that is not revoked stays as it is. Raises UnknownDevice.
    """
    async with lasting(conn):
        device_no = await _device_no(conn, device_id)
        await conn.execute(_Q["readmit_tokens"], device_no)
        was_revoked = await conn.fetchval(_Q["readmit_device"], device_no) is not None
        return Readmitted(was_revoked, await conn.fetchval(_Q["count_tokens"], device_no))


async def page(conn: Connection, after: str, limit: int) -> list[asyncpg.Record]:
    """Known devices by device_id, from behind `after`."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["list_devices"], after, limit)
    return rows


async def _device_no(conn: Connection, device_id: str) -> int:
    device_no = await conn.fetchval(_Q["device_no"], device_id)
    if device_no is None:
        raise UnknownDevice(f"{quoted(device_id)}.", hint="`nexhb devices list` shows them.")
    return int(device_no)


def _check_device_id(device_id: str) -> None:
    _check_text(device_id, "device_id", 100)
    if device_id in RESERVED:
        raise BadInput(f"device_id {quoted(device_id)} is the name of a list.")


def _check_text(value: str, what: str, longest: int) -> None:
    odd = unfit(value)
    if not 1 <= len(value) <= longest or odd:
        raise BadInput(f"{what} takes 1 to {longest} printable characters{f', and {odd} is none' if odd else ''}.")


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    rows: int
    devices_made: int
    tokens_added: int
    rows_of_revoked: int = 0  # their devices go on hearing 410
    found: str = field(default="", compare=False)  # what is to be said of a file that is not just as documented


async def import_csv(conn: Connection, path: Path) -> Imported:
    """Take the devices and tokens of a table (see devicefile); all or none. Idempotent.

    Raises BadInput naming the bad lines.
    """
    file = devicefile.parse(await asyncio.to_thread(path.read_bytes))
    records: list[tuple[int, str, str | None, str | None, bytes]] = []
    bad = [(line, why, "") for line, why in file.bad]
    for row in file.rows:
        try:
            records.append((row.line, row.device_id, row.alias or None, row.name or None, _checked(row)))
        except BadInput as error:
            bad.append((row.line, error.detail.rstrip("."), ""))
    if bad:
        raise _bad_lines(sorted(bad))
    async with lasting(conn):
        await conn.execute(_Q["import_table"])
        await conn.copy_records_to_table("device_import", records=records)
        if conflicts := await conn.fetch(_Q["import_conflicts"]):
            raise _bad_lines([(r["line"], r["why"], r["device_id"]) for r in conflicts])
        found = await conn.fetch(_Q["import_devices"])
        added = await conn.execute(_Q["import_tokens"])
    made, revoked = sum(row["made"] for row in found), sum(row["revoked"] for row in found)
    return Imported(len(records), made, int(added.split()[-1]), revoked, "" if file.is_plain else file.found())


def _checked(row: devicefile.Row) -> bytes:
    """The hash of its token. Raises BadInput."""
    _check_device_id(row.device_id)
    for text, what in ((row.alias, "alias"), (row.name, "name")):
        if text:
            _check_text(text, what, 200)
    if row.token:
        if len(row.token) < 32:
            raise BadInput("a token has 32 characters or more.")
        return hash_token(row.token)
    try:
        digest = bytes.fromhex(row.token_sha256)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise BadInput("takes a token, or its SHA-256 as 64 hexadecimal digits.")
    return digest


def _bad_lines(bad: list[tuple[int, str, str]]) -> BadInput:
    """Line, what is wrong with it, and whose it is where that helps; the first of them are named."""
    named = [f"line {line}{f' ({shown(of)})' if of else ''}: {why}" for line, why, of in bad[:LINES_NAMED]]
    more = f"; and {len(bad) - LINES_NAMED:,} lines more" if len(bad) > LINES_NAMED else ""
    return BadInput(f"{'; '.join(named)}{more}.", hint="Nothing was imported.")


# ---- enrolment ------------------------------------------------------------------------------------------------


async def issue_enrolment_key(conn: Connection, *, note: str | None, uses: int, expires_at: datetime) -> str:
    """A key with which devices may register themselves `uses` times until `expires_at`; shown this once. Raises
    BadInput."""
    if note is not None:
        _check_text(note, "note", 200)
    key = new_token()
    async with lasting(conn):
        await conn.execute(_Q["add_enrolment_key"], hash_token(key), note, uses, expires_at)
    return key


async def enrol(conn: Connection, key: str, device_id: str | None, alias: str | None, now: datetime) -> tuple[str, str]:
    """A new device against one use of `key`: its device_id, a random one unless it is given, and its token. Raises
    EnrolmentRefused, DeviceExists, BadInput; then the use is not spent.

    A device that registered with this key before and has sent nothing since did not hear the answer: it gets another
    token in the place of that one, and no further use is spent. Without a device_id that device is known by its alias,
    and only once the key is used up: while uses are left, the same alias may be a second kiosk's.
    """
    key_hash = hash_token(key)
    async with lasting(conn):
        uses_left = await conn.fetchval(_Q["hold_enrolment_key"], key_hash, now)
        if uses_left is None:
            raise EnrolmentRefused("It is unknown, used up or expired.")
        if again := await _enrolled_in_vain(conn, key_hash, device_id, alias, uses_left):
            return again["device_id"], await _enrol_again(conn, again["device_no"], alias)
        if not uses_left:
            raise EnrolmentRefused("It is unknown, used up or expired.")
        device_id = device_id or str(uuid4())
        token = await add(conn, device_id, alias)
        await conn.execute(_Q["use_enrolment_key"], key_hash)
        await conn.execute(_Q["add_enrolment"], await _device_no(conn, device_id), key_hash, now)
        return device_id, token


async def _enrolled_in_vain(
    conn: Connection, key_hash: bytes, device_id: str | None, alias: str | None, uses_left: int
) -> asyncpg.Record | None:
    """The one device that registered with this key and did not hear the answer, as far as can be told."""
    if "\0" in f"{device_id}{alias}":
        return None
    if device_id is not None:
        return await conn.fetchrow(_Q["enrolled_in_vain"], device_id, key_hash)
    if uses_left or alias is None:
        return None
    found = await conn.fetch(_Q["enrolled_in_vain_as"], alias, key_hash)
    return found[0] if len(found) == 1 else None


async def _enrol_again(conn: Connection, device_no: int, alias: str | None) -> str:
    if alias is not None:
        _check_text(alias, "alias", 200)
        await conn.execute(_Q["rename"], device_no, alias)
    token = new_token()
    await conn.execute(_Q["drop_tokens"], device_no)
    await conn.execute(_Q["add_token"], hash_token(token), device_no)
    return token
