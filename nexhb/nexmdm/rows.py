"""Convert rows of NexMDM to rows of nexhb. Pure. A value that does not fit becomes null and is reported."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple, Protocol

from nexhb.heartbeat import COLUMNS, HISTORY_COLUMNS, Label, bucket_of
from nexhb.postgres.codecs import pack_ip
from nexhb.texts import unfit

_BCRYPT = re.compile(r"\$2[abxy]\$(\d\d)\$[./A-Za-z0-9]{53}")
MAX_BCRYPT_COST = 14  # limit of bcrypt's cost: 2^14 rounds take one second; NexMDM uses a cost of 12
RESERVED = ("offline", "unity-down")


class Columns(Protocol):
    """A row of a table, with values by column name."""

    def __getitem__(self, column: str, /) -> Any: ...


class SourceRow(NamedTuple):
    """A converted heartbeat, whose label has no number yet."""

    label: Label
    values: dict[str, Any]  # values by column, without label_no
    key: tuple[int, int]  # device_no, bucket

    def record(self, label_no: int) -> tuple[Any, ...]:
        """Return the values in the order of HISTORY_COLUMNS; a column that NexMDM does not have is null."""
        values = self.values | {"label_no": label_no}
        return tuple(values.get(column) for column in HISTORY_COLUMNS)


def heartbeat(row: Columns, device_no: int, bucket_s: int, dropped: list[str]) -> SourceRow:
    """Convert one row of NexMDM's device_heartbeats. NexMDM has no other time of arrival than ts."""
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
    values = {
        "ts": ts,
        "received_at": ts,
        "device_no": device_no,
        "bucket": bucket,
        "clock_wrong": False,
        "battery_pct": _integer(row, "battery_pct", dropped),
        "plugged": row["plugged"],
        "temp_c": row["temp_c"],
        "ip": ip,
        "signal_dbm": _integer(row, "signal_dbm", dropped),
        "uptime_s": _integer(row, "uptime_s", dropped),
        "ram_used_mb": _integer(row, "ram_used_mb", dropped),
        "unity_running": row["unity_running"],
    }
    return SourceRow(label, values, (device_no, bucket))


def _integer(row: Columns, column: str, dropped: list[str]) -> int | None:
    value: int | None = row[column]
    low, high = COLUMNS[column].limits
    if value is None or low <= value <= high:
        return value
    dropped.append(column)
    return None


def _text(row: Columns, column: str, dropped: list[str]) -> str | None:
    value: str | None = row[column]
    if not value or len(value) <= COLUMNS[column].limits[1]:
        return value or None
    dropped.append(column)
    return None


# ---- devices ----------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What NexMDM stores of a device's token: its SHA-256, or only a bcrypt hash."""

    sha256: bytes | None
    bcrypt: str | None
    fingerprint: bytes  # identifies the credential; unchanged when NexMDM later stores the token's SHA-256


def facts(row: Columns, dropped: list[str]) -> tuple[Any, ...]:
    """Return the device's alias, android_version, sdk_int, build_id, model and manufacturer."""
    texts = {
        name: _text(row, name, dropped) for name in ("alias", "android_version", "build_id", "model", "manufacturer")
    }
    return (
        texts["alias"], texts["android_version"], _integer(row, "sdk_int", dropped), texts["build_id"],
        texts["model"], texts["manufacturer"],
    )  # fmt: skip


def name(row: Columns) -> str | None:
    """Return the device's name, which NexMDM calls alias: operators set it, and no heartbeat changes it."""
    return _text(row, "alias", [])


def id_error(device_id: str) -> str | None:
    """Return why nexhb cannot use this device id, or None if it can."""
    if not 1 <= len(device_id) <= 100 or unfit(device_id):
        return "the id is not 1 to 100 printable characters"
    return "the id is reserved: it is the name of a list" if device_id in RESERVED else None


def token(row: Columns) -> Token | str:
    """Return the device's token, or the reason why it has no usable token."""
    try:
        digest = bytes.fromhex(row["token_id"] or "")
    except ValueError:
        digest = b""
    hashed = _BCRYPT.fullmatch(row["token_hash"] or "")
    fingerprint = hashlib.sha256(hashed[0].encode()).digest() if hashed else digest
    if len(digest) == 32:
        return Token(digest, None, fingerprint)
    if hashed and int(hashed[1]) <= MAX_BCRYPT_COST:
        return Token(None, hashed[0], fingerprint)
    return "there is neither a token_id nor a usable bcrypt hash: give the device a new token (nexhb devices rotate)"
