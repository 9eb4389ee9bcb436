"""Feature flags, which operators change while daemons run. They are stored in feature_flags; a change takes effect at
once in every daemon and survives restarts.

The configuration gives a flag its initial value at the first start. Later, only the value in the database counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from nexhb import config, log, metrics
from nexhb.errors import described
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database, lasting
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.identity import DatabaseTracker

_Q = sql.queries("flags")
_log = log.get("flags")

CHANNEL = "nexhb_flags"
POLL_S = 1.0  # seconds between polls, in case a notification is lost; a poll reads a few rows twice
RESPONSE_TIMEOUT_S = 5.0  # seconds; a connection counts as lost if a poll takes longer

Value = bool | int


@dataclass(frozen=True)
class Flags:
    """The values of all flags, already validated."""

    read_from_last_status: bool = True
    rollout_percent: int = 100  # the percentage of devices and lists that use the fast reads
    perf_diff: bool = False

    def shown(self) -> dict[str, Value]:
        """Return the flags as /ops/flags shows them."""
        return asdict(self)


NAMES = tuple(Flags().shown())


def first_values(settings: config.ReadsSettings) -> Flags:
    """Return the initial values, from the configuration."""
    return Flags(settings.from_last_status, settings.rollout_percent, settings.perf_diff)


def check(flag: str, value: object) -> Value:
    """Return the value as it is stored. Raise a ValueError that says which values the flag takes."""
    if flag not in NAMES:
        raise ValueError(f"no such flag; there are {', '.join(NAMES)}")
    if flag == "rollout_percent":
        # 10.0 is accepted, because JSON does not distinguish it from 10.
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not (is_whole and 0 <= value <= 100):  # type: ignore[operator]
            raise ValueError("takes a whole number from 0 to 100")
        return int(value)  # type: ignore[call-overload, no-any-return]
    if not isinstance(value, bool):
        raise ValueError("takes true or false")  # noqa: TRY004 - every invalid value raises ValueError
    return value


# ---- changes --------------------------------------------------------------------------------------------------------


async def change(conn: Connection, changes: Mapping[str, Value], by: str, now: datetime, first: Flags) -> Flags:
    """Change these validated flags in one transaction and return all flags. Setting a flag to its present value changes
    nothing. A flag without a row has its value in `first` until then."""
    async with lasting(conn):
        await store_first(conn, first, now)
        await conn.fetch(_Q["hold"], sorted(changes))
        for flag, value in changes.items():
            await conn.execute(_Q["change"], flag, orjson.dumps(value).decode(), now, by[:200])
        return await read(conn, first)


async def store_first(conn: Connection, first: Flags, now: datetime) -> None:
    """Insert a row for each flag that has none."""
    values = [orjson.dumps(value).decode() for value in first.shown().values()]
    await conn.execute(_Q["add_missing"], list(NAMES), values, now, "config")


async def read(conn: Connection, default: Flags) -> Flags:
    """Return the flags in the database. A flag without a row, or with an invalid value, has its value in `default`."""
    values: dict[str, Any] = {}
    for row in await conn.fetch(_Q["values"]):
        if row["flag"] in NAMES:
            try:
                values[row["flag"]] = check(row["flag"], orjson.loads(row["value"]))
            except ValueError as error:
                _log.error("flags.not_valid", flag=row["flag"], value=row["value"], error=str(error))
    return replace(default, **values)


async def last_changes(conn: Connection, limit: int) -> list[dict[str, Any]]:
    """Return the last changes, newest first, each with flag, from, to, at and by."""
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


# ---- in the daemon --------------------------------------------------------------------------------------------------


class FlagStore:
    """The daemon's in-memory copy of the flags, `current`, which keeps its values while the database is unavailable."""

    def __init__(
        self, database: Database, first: Flags, now: Callable[[], datetime], tracker: DatabaseTracker | None = None
    ) -> None:
        self._database = database
        self._tracker = tracker or DatabaseTracker()
        self._tracker.on_change(self._terminate)
        self._epoch = self._tracker.epoch  # the value of epoch when the flags were loaded
        self._conn: Connection | None = None
        self._first = first
        self._now = now
        self._last_change_no = 0  # number of the last change that was logged
        self._changed = asyncio.Event()
        self._reading = asyncio.Lock()  # held while flags are read and stored, so old values never replace newer ones
        self.current = first

    async def load(self) -> None:
        """Insert rows for new flags, then read all flags. Raise DatabaseUnavailable."""
        async with self._database.connected(application="nexhb flags") as conn:
            await self._initialize(conn)
            await self._read(conn)

    async def _initialize(self, conn: Connection) -> None:
        self._epoch = self._tracker.epoch
        self._last_change_no = await conn.fetchval(_Q["last_change_no"])
        await store_first(conn, self._first, self._now())

    def _terminate(self) -> None:
        if self._conn is not None:
            self._conn.terminate()

    async def change(self, changes: Mapping[str, Value], by: str) -> Flags:
        """Change these validated flags for every daemon. The change is in force here on return. Raise
        DatabaseUnavailable."""
        connected = self._database.connected(application="nexhb flags", command_timeout_s=10, lock_timeout="3000")
        async with connected as conn, self._reading:
            self._set(await change(conn, changes, by, self._now(), self._first))
        return self.current

    async def run(self) -> None:
        """Keep the flags current until cancelled, reconnecting after errors of the database."""
        while True:
            try:
                await self._follow()
            except FROM_THE_DATABASE as error:
                _log.warning("flags.listen_lost", error=described(error))
                await asyncio.sleep(POLL_S)

    async def _follow(self) -> None:
        conn = await self._database.connect(
            application="nexhb flags", command_timeout_s=RESPONSE_TIMEOUT_S, timeout_s=RESPONSE_TIMEOUT_S
        )
        try:
            conn.add_termination_listener(lambda _: self._changed.set())
            await conn.add_listener(CHANNEL, lambda *_: self._changed.set())
            self._conn = conn
            if self._epoch != self._tracker.epoch:
                await self._initialize(conn)  # the database was replaced by another, which has other flags
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
            self._set(await read(conn, self._first))
        for row in await conn.fetch(_Q["changes_since"], self._last_change_no):
            self._last_change_no = row["change_no"]
            old, new = _value(row["value_from"]), _value(row["value_to"])
            _log.info("flags.changed", flag=row["flag"], **{"from": old}, to=new, by=row["changed_by"])

    def _set(self, flags: Flags) -> None:
        self.current = flags
        for flag, value in flags.shown().items():
            metrics.flag.labels(flag=flag).set(value)
