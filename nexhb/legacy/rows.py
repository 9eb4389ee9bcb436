"""A row of NexMDM → what nexhb stores. Pure. What does not fit becomes null, and its column is named."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple, Protocol

from nexhb.texts import unfit
from nexhb.wire import INT16_MAX, INT32_MAX, Label, bucket_of, pack_ip

_BCRYPT = re.compile(r"\$2[abxy]\$(\d\d)\$[./A-Za-z0-9]{53}")
COST_MOST = 14  # rounds of bcrypt, as a power of two: a second for each try; NexMDM has 12
RESERVED = ("offline", "unity-down")
_LONGEST = {
    "network_type": 32, "ssid": 100, "unity_pkg_version": 100, "agent_version": 50, "alias": 200, "model": 100,
    "manufacturer": 100, "android_version": 50, "build_id": 100,
}  # fmt: skip


class Columns(Protocol):
    """A row of a table, by the names of its columns."""

    def __getitem__(self, column: str, /) -> Any: ...


class Row(NamedTuple):
    """A heartbeat, without the number of its label."""

    label: Label
    before: tuple[Any, ...]  # HISTORY_COLUMNS up to label_no
    after: tuple[Any, ...]  # and behind it
    key: tuple[int, int]  # device_no, bucket

    def record(self, label_no: int) -> tuple[Any, ...]:
        """In the order of HISTORY_COLUMNS."""
        return (*self.before, label_no, *self.after)


def heartbeat(row: Columns, device_no: int, bucket_s: int, dropped: list[str]) -> Row:
    """One row of its device_heartbeats. When it was received NexMDM does not say: its ts is that time."""
    ts = row["ts"]
    bucket = bucket_of(ts, bucket_s)
    ip = pack_ip(row["ip"]) if row["ip"] else None
    if row["ip"] and ip is None:
        dropped.append("ip")
    label = Label(
        _text(row, "agent_version", dropped) or "",
        _text(row, "unity_pkg_version", dropped) or "",
        _text(row, "network_type", dropped) or "",
        _text(row, "ssid", dropped) or "",
    )
    after = (
        _integer(row, "uptime_s", 0, INT32_MAX, dropped),
        _integer(row, "ram_used_mb", 0, INT32_MAX, dropped),
        row["temp_c"],
        _integer(row, "battery_pct", 0, 100, dropped),
        _integer(row, "signal_dbm", -INT16_MAX - 1, INT16_MAX, dropped),
        row["plugged"],
        row["unity_running"],
        False,
        ip,
    )
    return Row(label, (ts, ts, device_no, bucket), after, (device_no, bucket))


def _integer(row: Columns, column: str, low: int, high: int, dropped: list[str]) -> int | None:
    value: int | None = row[column]
    if value is None or low <= value <= high:
        return value
    dropped.append(column)
    return None


def _text(row: Columns, column: str, dropped: list[str]) -> str | None:
    value: str | None = row[column]
    if not value or len(value) <= _LONGEST[column]:
        return value or None
    dropped.append(column)
    return None


# ---- devices ----------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What NexMDM knows of a device's token: its SHA-256, or a bcrypt hash for which the token is still to come."""

    sha256: bytes | None
    bcrypt: str | None
    fingerprint: bytes  # of the credential: the same whether or not NexMDM has learned the token's SHA-256


def facts(row: Columns, dropped: list[str]) -> tuple[Any, ...]:
    """alias, android_version, sdk_int, build_id, model, manufacturer."""
    texts = {
        name: _text(row, name, dropped) for name in ("alias", "android_version", "build_id", "model", "manufacturer")
    }
    return (
        texts["alias"], texts["android_version"], _integer(row, "sdk_int", 0, INT32_MAX, dropped), texts["build_id"],
        texts["model"], texts["manufacturer"],
    )  # fmt: skip


def name(row: Columns) -> str | None:
    """What NexMDM calls it: its alias there is given by people, and no heartbeat changes it."""
    return _text(row, "alias", [])


def why_no_device(device_id: str) -> str | None:
    """Why nexhb cannot have a device of that id; None where it can."""
    if not 1 <= len(device_id) <= 100 or unfit(device_id):
        return "its id is not 1 to 100 printable characters"
    return "its id is the name of a list" if device_id in RESERVED else None


def token(row: Columns) -> Token | str:
    """Its token, or why there is none."""
    try:
        digest = bytes.fromhex(row["token_id"] or "")
    except ValueError:
        digest = b""
    hashed = _BCRYPT.fullmatch(row["token_hash"] or "")
    fingerprint = hashlib.sha256(hashed[0].encode()).digest() if hashed else digest
    if len(digest) == 32:
        return Token(digest, None, fingerprint)
    if hashed and int(hashed[1]) <= COST_MOST:
        return Token(None, hashed[0], fingerprint)
    return "it has neither a token_id nor a usable bcrypt hash: give it a new token (nexhb devices rotate)"
