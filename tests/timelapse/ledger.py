"""The acknowledged heartbeats, in memory: the rows that must exist at the end, whatever happened."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from nexhb.archive.manifest import COLUMNS
from nexhb.heartbeat import CONTENT, Heartbeat
from nexhb.ingest.batch import is_newer
from nexhb.ingest.intake import Outcome

Key = tuple[int, int]  # device_no, bucket
Row = tuple[Any, ...]  # in the order of COLUMNS, as in the view heartbeat_history


class BrokenPromise(BaseException):
    """A promise of nexhb was broken. Not an Exception, because a job would treat it as its own failure."""


def _float32(value: float | None) -> float | None:
    """Round as PostgreSQL's type real does."""
    return None if value is None else float(struct.unpack("f", struct.pack("f", value))[0])


def row_of(h: Heartbeat) -> Row:
    """Return the row that must exist for this heartbeat."""
    values = msgspec.structs.asdict(h) | {name: text or None for name, text in h.label._asdict().items()}
    values["temp_c"] = _float32(h.temp_c)
    values["ip"] = h.ip and str(ipaddress.ip_address(h.ip[4:]))
    return tuple(values[name] for name in COLUMNS)


def row_of_record(record: asyncpg.Record) -> Row:
    """Convert a row of heartbeat_history."""
    return tuple(_from_record(name, record[name]) for name in COLUMNS)


def _from_record(name: str, value: Any) -> Any:
    return str(value) if name == "ip" and value is not None else value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "boolean": lambda text: text == "t",
    "integer": int,
    "smallint": int,
    "real": lambda text: _float32(float(text)),
    "timestamptz": datetime.fromisoformat,
}
_TYPES = {column.name: column.type for column in CONTENT} | {
    "ts": "timestamptz", "received_at": "timestamptz", "clock_wrong": "boolean", "device_no": "integer",
    "bucket": "integer",
}  # fmt: skip


def row_of_texts(texts: Sequence[str]) -> Row:
    """Convert a row of an archive's CSV."""
    if len(texts) != len(COLUMNS):
        raise BrokenPromise(f"A row of an archive has {len(texts)} columns: {texts}")
    return tuple(_value(name, text) if text else None for name, text in zip(COLUMNS, texts, strict=True))


def _value(name: str, text: str) -> Any:
    return _PARSERS.get(_TYPES.get(name, "text"), str)(text)


def key_of(row: Row) -> Key:
    """Return the key of a row."""
    return row[-2], row[-1]


class Ledger:
    """Every acknowledged heartbeat, by key, and the newest of each device."""

    def __init__(self) -> None:
        self.rows: dict[Key, list[Row]] = {}  # acknowledged as written; see `written_again`
        self.newest: dict[int, Heartbeat] = {}  # including duplicates, which also change a status
        # The app_version that each device's status may have: a heartbeat without one keeps the earlier version. There
        # are several after a 503, because that heartbeat may have changed the status or not.
        self._versions: dict[int, set[str]] = {}
        self._newest_in_doubt: dict[int, datetime] = {}  # the latest ts that received 503
        self.last_received: dict[int, datetime] = {}  # when each device was last seen
        self.written = self.deduplicated = self.failed = 0
        # Acknowledged as written although they are duplicates: their day was archived, so they were not recognized.
        self.written_again = 0
        self._in_doubt: dict[Key, list[Row]] = {}  # received 503: they may be stored or not

    def record(self, heartbeat: Heartbeat, outcome: Outcome) -> None:
        """Record the response to a heartbeat."""
        row = row_of(heartbeat)
        key = key_of(row)
        if outcome is Outcome.FAILED:
            self.failed += 1
            self._in_doubt.setdefault(key, []).append(row)
            in_doubt = self._newest_in_doubt.get(heartbeat.device_no, heartbeat.ts)
            self._newest_in_doubt[heartbeat.device_no] = max(in_doubt, heartbeat.ts)
            self._allow_version(heartbeat)
            return
        if outcome is Outcome.WRITTEN:
            self.written += 1
            self.written_again += key in self.rows
            self.rows.setdefault(key, []).append(row)
        elif outcome is Outcome.DEDUPLICATED:
            self.deduplicated += 1
            if key not in self.rows:
                if key not in self._in_doubt:
                    raise BrokenPromise(f"{key} was acknowledged as a duplicate, but had never been written.")
                self.rows[key] = self._in_doubt.pop(key)
        else:
            raise BrokenPromise(f"{heartbeat} was rejected.")
        known = self.newest.get(heartbeat.device_no)
        if known is None or is_newer(known, heartbeat):
            self.newest[heartbeat.device_no] = heartbeat
            self._record_version(heartbeat)
        last = self.last_received.get(heartbeat.device_no, heartbeat.received_at)
        self.last_received[heartbeat.device_no] = max(last, heartbeat.received_at)

    def _record_version(self, heartbeat: Heartbeat) -> None:
        number, version = heartbeat.device_no, heartbeat.label.agent_version
        in_doubt = self._newest_in_doubt.get(number)
        if in_doubt is not None and heartbeat.ts <= in_doubt:
            self._allow_version(heartbeat)
            return
        self._newest_in_doubt.pop(number, None)
        if version:
            self._versions[number] = {version}

    def _allow_version(self, heartbeat: Heartbeat) -> None:
        if heartbeat.label.agent_version:
            self._versions.setdefault(heartbeat.device_no, {""}).add(heartbeat.label.agent_version)

    def statuses(self, device_no: int) -> list[Row]:
        """Return the rows that the status of this device may equal."""
        newest = self.newest[device_no]
        versions = {newest.label.agent_version} if newest.label.agent_version else self._versions.get(device_no, {""})
        return [
            row_of(msgspec.structs.replace(newest, label=newest.label._replace(agent_version=version)))
            for version in sorted(versions)
        ]
