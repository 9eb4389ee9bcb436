"""What was acknowledged, in plain Python: the rows that must be found at the end, whatever happened on the way."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from nexhb.archive.manifest import COLUMNS
from nexhb.batch import is_newer
from nexhb.intake import Outcome
from nexhb.wire import Heartbeat

Key = tuple[int, int]  # device_no, bucket
Row = tuple[Any, ...]  # in the order of COLUMNS, which is that of the view heartbeat_history


class Broken(BaseException):
    """Something that nexhb promises did not hold. Not an Exception: a job would take it for a failure of its own."""


def _float32(value: float | None) -> float | None:
    """As PostgreSQL's real keeps it."""
    return None if value is None else float(struct.unpack("f", struct.pack("f", value))[0])


def row_of(h: Heartbeat) -> Row:
    """As it must be found."""
    return (
        h.device_id, h.ts, h.received_at, h.clock_wrong, h.battery_pct, h.plugged, _float32(h.temp_c),
        h.label.network_type or None, h.label.ssid or None, h.ip and str(ipaddress.ip_address(h.ip[4:])),
        h.signal_dbm, h.uptime_s, h.ram_used_mb, h.label.unity_pkg_version or None, h.unity_running,
        h.label.agent_version or None, h.device_no, h.bucket,
    )  # fmt: skip


def row_of_record(record: asyncpg.Record) -> Row:
    """A row of heartbeat_history."""
    return tuple(_from_record(name, record[name]) for name in COLUMNS)


def _from_record(name: str, value: Any) -> Any:
    return str(value) if name == "ip" and value is not None else value


_NUMBERS = ("battery_pct", "signal_dbm", "uptime_s", "ram_used_mb", "device_no", "bucket")
_READ: dict[str, Callable[[str], Any]] = {
    **{name: lambda text: text == "t" for name in ("clock_wrong", "plugged", "unity_running")},
    **dict.fromkeys(_NUMBERS, int),
    **dict.fromkeys(("ts", "received_at"), datetime.fromisoformat),
    "temp_c": lambda text: _float32(float(text)),
}


def row_of_texts(texts: Sequence[str]) -> Row:
    """A row of an archive's CSV."""
    if len(texts) != len(COLUMNS):
        raise Broken(f"A row of an archive has {len(texts)} columns: {texts}")
    return tuple(_READ.get(name, str)(text) if text else None for name, text in zip(COLUMNS, texts, strict=True))


def key_of(row: Row) -> Key:
    """The key of a row."""
    return row[-2], row[-1]


def _with_what_stays(known: Heartbeat | None, newer: Heartbeat) -> Heartbeat:
    """What is known of a device once `newer` came: an app_version that it does not say stays."""
    if known is None or newer.label.agent_version:
        return newer
    label = newer.label._replace(agent_version=known.label.agent_version)
    return msgspec.structs.replace(newer, label=label)


class Ledger:
    """Every acknowledged heartbeat, by key, and the newest of each device."""

    def __init__(self) -> None:
        self.rows: dict[Key, list[Row]] = {}  # what was acknowledged as written; see `again`
        self.newest: dict[int, Heartbeat] = {}  # duplicates too: they move a status
        self.heard: dict[int, datetime] = {}  # when a device was last heard
        self.written = self.deduplicated = self.failed = 0
        self.again = 0  # acknowledged as written though the key had been: its day was gone, nobody could know
        self._doubtful: dict[Key, list[Row]] = {}  # answered 503: they may be in

    def take(self, heartbeat: Heartbeat, outcome: Outcome) -> None:
        """What a device heard."""
        row = row_of(heartbeat)
        key = key_of(row)
        if outcome is Outcome.FAILED:
            self.failed += 1
            self._doubtful.setdefault(key, []).append(row)
            return
        if outcome is Outcome.WRITTEN:
            self.written += 1
            self.again += key in self.rows
            self.rows.setdefault(key, []).append(row)
        elif outcome is Outcome.DEDUPLICATED:
            self.deduplicated += 1
            if key not in self.rows:
                if key not in self._doubtful:
                    raise Broken(f"{key} was called a duplicate and had never been written.")
                self.rows[key] = self._doubtful.pop(key)
        else:
            raise Broken(f"{heartbeat} was refused.")
        known = self.newest.get(heartbeat.device_no)
        if known is None or is_newer(known, heartbeat):
            self.newest[heartbeat.device_no] = _with_what_stays(known, heartbeat)
        heard = self.heard.get(heartbeat.device_no, heartbeat.received_at)
        self.heard[heartbeat.device_no] = max(heard, heartbeat.received_at)
