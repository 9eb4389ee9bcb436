"""What operators switch while daemons run: in feature_flags, at once in every daemon, across restarts.

The configuration gives a flag its first value, at the first start; from then on the database counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from nexhb import config, log, metrics, sql
from nexhb.db import Connection, Database, lasting
from nexhb.identity import Lives
from nexhb.pgerrors import FROM_THE_DATABASE

_Q = sql.queries("flags")
_log = log.get("flags")

CHANNEL = "nexhb_flags"
POLL_S = 1.0  # should a notification be lost: two reads of a few rows
ANSWER_S = 5.0  # a database that does not answer a poll by then is gone

Value = bool | int


@dataclass(frozen=True)
class Flags:
    """All of them. Whoever makes one has checked its values."""

    read_from_last_status: bool = True
    rollout_percent: int = 100  # of devices and lists
    perf_diff: bool = False

    def shown(self) -> dict[str, Value]:
        """As /ops/flags answers them."""
        return asdict(self)


NAMES = tuple(Flags().shown())


def first_values(settings: config.Reads) -> Flags:
    """What the configuration says."""
    return Flags(settings.from_last_status, settings.rollout_percent, settings.perf_diff)


def check(flag: str, value: object) -> Value:
    """The value as it is stored. Raises ValueError that says what the flag takes."""
    if flag not in NAMES:
        raise ValueError(f"no such flag; there are {', '.join(NAMES)}")
    if flag == "rollout_percent":
        # JSON has one kind of number: 10.0 is 10.
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not (whole and 0 <= value <= 100):  # type: ignore[operator]
            raise ValueError("takes a whole number from 0 to 100")
        return int(value)  # type: ignore[call-overload, no-any-return]
    if not isinstance(value, bool):
        raise ValueError("takes true or false")  # noqa: TRY004 - as the others do
    return value


# ---- changes --------------------------------------------------------------------------------------------------------


async def change(conn: Connection, changes: Mapping[str, Value], by: str, now: datetime, first: Flags) -> Flags:
    """Change these (checked) flags, in one transaction, and answer all. What is so already is no change. Flags that
    have no row yet begin with `first`."""
    async with lasting(conn):
        await store_first(conn, first, now)
        await conn.fetch(_Q["hold"], sorted(changes))
        for flag, value in changes.items():
            await conn.execute(_Q["change"], flag, orjson.dumps(value).decode(), now, by[:200])
        return await read(conn, first)


async def store_first(conn: Connection, first: Flags, now: datetime) -> None:
    """Rows for the flags that have none."""
    values = [orjson.dumps(value).decode() for value in first.shown().values()]
    await conn.execute(_Q["add_missing"], list(NAMES), values, now, "config")


async def read(conn: Connection, otherwise: Flags) -> Flags:
    """As they stand in the database; what has no row there, or a value that is none, is as in `otherwise`."""
    found: dict[str, Any] = {}
    for row in await conn.fetch(_Q["values"]):
        if row["flag"] in NAMES:
            try:
                found[row["flag"]] = check(row["flag"], orjson.loads(row["value"]))
            except ValueError as error:
                _log.error("flags.not_valid", flag=row["flag"], value=row["value"], error=str(error))
    return replace(otherwise, **found)


async def last_changes(conn: Connection, limit: int) -> list[dict[str, Any]]:
    """The last changes, newest first: flag, from, to, at, by."""
    return [
        {
            "flag": row["flag"],
            "from": _value(row["value_from"]),
            "to": _value(row["value_to"]),
            "at": row["changed_at"],
            "by": row["changed_by"],
        }
        for row in await conn.fetch(_Q["last_changes"], limit)
    ]


def _value(text: str | None) -> object:
    return None if text is None else orjson.loads(text)


# ---- the daemon's own -----------------------------------------------------------------------------------------------


class FlagStore:
    """The daemon's memory of the flags: `current` takes no time. It stays as it is while the database is away."""

    def __init__(
        self, database: Database, first: Flags, now: Callable[[], datetime], lives: Lives | None = None
    ) -> None:
        self._database = database
        self._lives = lives or Lives()
        self._lives.on_change(self._leave)
        self._life = self._lives.number  # in which it was loaded
        self._conn: Connection | None = None
        self._first = first
        self._now = now
        self._seen = 0  # the last change that was logged here
        self._changed = asyncio.Event()
        self._reading = asyncio.Lock()  # what was read before a change must not be adopted after it
        self.current = first

    async def load(self) -> None:
        """Store what is not stored yet, and read. Raises DatabaseUnavailable."""
        async with self._database.connected(application="nexhb flags") as conn:
            await self._begin(conn)
            await self._read(conn)

    async def _begin(self, conn: Connection) -> None:
        self._life = self._lives.number
        self._seen = await conn.fetchval(_Q["last_change_no"])
        await store_first(conn, self._first, self._now())

    def _leave(self) -> None:
        if self._conn is not None:
            self._conn.terminate()

    async def change(self, changes: Mapping[str, Value], by: str) -> Flags:
        """Change these (checked) flags for every daemon; in force here when it returns. Raises DatabaseUnavailable."""
        connected = self._database.connected(application="nexhb flags", command_timeout_s=10, lock_timeout="3000")
        async with connected as conn, self._reading:
            self._adopt(await change(conn, changes, by, self._now(), self._first))
        return self.current

    async def run(self) -> None:
        """Follow the flags until cancelled. The database's absence is waited for."""
        while True:
            try:
                await self._follow()
            except FROM_THE_DATABASE as error:
                _log.warning("flags.listen_lost", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(POLL_S)

    async def _follow(self) -> None:
        conn = await self._database.connect(application="nexhb flags", command_timeout_s=ANSWER_S, timeout_s=ANSWER_S)
        try:
            conn.add_termination_listener(lambda _: self._changed.set())
            await conn.add_listener(CHANNEL, lambda *_: self._changed.set())
            self._conn = conn
            if self._life != self._lives.number:
                await self._begin(conn)  # another database has flags, and changes, of its own
            while True:
                self._changed.clear()
                await self._read(conn)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._changed.wait()
        finally:
            with suppress(Exception):
                await conn.close(timeout=2)

    async def _read(self, conn: Connection) -> None:
        async with self._reading:
            self._adopt(await read(conn, self._first))
        for row in await conn.fetch(_Q["changes_since"], self._seen):
            self._seen = row["change_no"]
            was, is_now = _value(row["value_from"]), _value(row["value_to"])
            _log.info("flags.changed", flag=row["flag"], **{"from": was}, to=is_now, by=row["changed_by"])

    def _adopt(self, found: Flags) -> None:
        self.current = found
        for flag, value in found.shown().items():
            metrics.flag.labels(flag=flag).set(value)
