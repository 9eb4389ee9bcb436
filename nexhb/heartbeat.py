"""What a heartbeat is: its fields, its key, and the columns in which it is stored. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

BUCKET_EPOCH = 1_577_836_800  # 2020-01-01T00:00:00Z: buckets are counted from here, so that int4 lasts until 2088

BUCKET_START = datetime(2020, 1, 1, tzinfo=UTC)

INT32_MAX = 2**31 - 1
INT16_MAX = 2**15 - 1
FLOAT32_MAX = 3.4e38

Key = int  # device_no and bucket in one integer: half the memory of a tuple, and the same order


def key_of(device_no: int, bucket: int) -> Key:
    """Return the key of a row of the history; keys sort by device_no, then bucket."""
    return (device_no << 32) + bucket


class FieldError(NamedTuple):
    """An error in a body: its dotted path (empty for the whole body), and a message."""

    path: str
    message: str


class Refused(Exception):
    """The body is not valid and never will be. `status` is the HTTP status to respond with."""

    def __init__(self, errors: list[FieldError], status: int = 422) -> None:
        self.errors = errors
        self.status = status
        super().__init__("; ".join(f"{e.path}: {e.message}" if e.path else e.message for e in errors))


class DeviceFacts(NamedTuple):
    """The fields of a heartbeat that describe the device itself; they rarely change and are stored in `devices`."""

    alias: str | None
    android_version: str | None
    sdk_int: int | None
    patch_level: str | None
    build_id: str | None
    model: str | None
    manufacturer: str | None


# The sections of a heartbeat. The agent omits nulls: a field that is missing from a section that is present is null. An
# absent section says nothing about its fields.
BATTERY, NETWORK, MEMORY, SYSTEM, APPS = 1, 2, 4, 8, 16
ALL_SECTIONS = BATTERY | NETWORK | MEMORY | SYSTEM | APPS


class Label(NamedTuple):
    """Fields that most heartbeats share and that are stored once: texts (empty if unknown) and the sections present."""

    agent_version: str
    unity_pkg_version: str
    network_type: str
    ssid: str
    sections: int = ALL_SECTIONS


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """A valid heartbeat, as it will be stored."""

    device_no: int
    device_id: str
    ts: datetime  # UTC; the device's timestamp, or the time of receipt if the device's clock is wrong
    received_at: datetime
    bucket: int  # start of the bucket of 10 s that contains `ts`, in seconds since BUCKET_EPOCH
    clock_wrong: bool
    label: Label
    battery_pct: int | None
    plugged: bool | None
    temp_c: float | None
    ip: bytes | None  # in PostgreSQL's binary format of inet
    signal_dbm: int | None
    uptime_s: int | None
    ram_used_mb: int | None
    unity_running: bool | None
    facts: DeviceFacts
    claimed_device_id: str | None  # the device_id of the body, if it differs from the token's
    queue_depth: int | None
    dropped: tuple[str, ...]  # optional fields that were unreadable and are stored as null


# ---- the columns ------------------------------------------------------------------------------------------------
#
# Only this list names the columns. Rows, COPY, the statements of sql/ (`{{content: …}}`, see sql/README.md), archives
# and the limits of the parser follow from it; docs/architecture.md explains how to add a field.


class Column(NamedTuple):
    """A column of what a device measured or stated. Its name is the same in every table and in archives."""

    name: str
    type: str  # in PostgreSQL
    section: int = 0  # if the request has this section, it overwrites the column of the last status; 0: no section
    limits: tuple[float, float] = (0, 0)  # limits of a number (rounded, in an integer column), or of a text's length
    archive_format: int = 1  # the first format of archives that contains the column (nexhb/archive/manifest.py)

    @property
    def in_label(self) -> bool:
        """Whether the column is in heartbeat_labels instead of device_heartbeats."""
        return self.name in Label._fields


# In the order in which rows are shown. An attribute of Heartbeat or of Label has the column's name.
CONTENT = (
    Column("battery_pct", "smallint", BATTERY, (0, 100)),
    Column("plugged", "boolean", BATTERY),
    Column("temp_c", "real", BATTERY, (-FLOAT32_MAX, FLOAT32_MAX)),
    Column("network_type", "text", NETWORK, (0, 32)),
    Column("ssid", "text", NETWORK, (0, 100)),
    Column("ip", "inet", NETWORK),
    Column("signal_dbm", "smallint", NETWORK, (-INT16_MAX - 1, INT16_MAX)),
    Column("uptime_s", "integer", SYSTEM, (0, INT32_MAX)),
    Column("ram_used_mb", "integer", MEMORY, (0, INT32_MAX)),
    Column("unity_pkg_version", "text", APPS, (0, 100)),
    Column("unity_running", "boolean", APPS),
    Column("agent_version", "text", 0, (0, 50)),
)
MEASURED = tuple(column for column in CONTENT if not column.in_label)

# The columns of `devices` that DeviceFacts describes, in its order.
FACTS = (
    Column("alias", "text", limits=(0, 200)),
    Column("android_version", "text", limits=(0, 50)),
    Column("sdk_int", "integer", limits=(0, INT32_MAX)),
    Column("patch_level", "text", limits=(0, 50)),
    Column("build_id", "text", limits=(0, 100)),
    Column("model", "text", limits=(0, 100)),
    Column("manufacturer", "text", limits=(0, 100)),
)

COLUMNS = {column.name: column for column in (*CONTENT, *FACTS)}

HISTORY_COLUMNS = (
    "ts", "received_at", "device_no", "bucket", "label_no", "clock_wrong", *(column.name for column in MEASURED),
)  # fmt: skip


def history_row(h: Heartbeat, label_no: int, pack: Callable[[datetime], object]) -> tuple[Any, ...]:
    """Return the row of device_heartbeats, in the order of HISTORY_COLUMNS, with times encoded by `pack`.

    The attributes are written out: operator.attrgetter would take a quarter longer (0.2 µs) for every heartbeat.
    """
    return (
        pack(h.ts), pack(h.received_at), h.device_no, h.bucket, label_no, h.clock_wrong,
        h.battery_pct, h.plugged, h.temp_c, h.ip, h.signal_dbm, h.uptime_s, h.ram_used_mb, h.unity_running,
    )  # fmt: skip


def bucket_of(ts: datetime, bucket_seconds: int) -> int:
    """Return the start of the bucket of `ts`, in seconds since BUCKET_EPOCH."""
    since = ts - BUCKET_START
    seconds = since.days * 86_400 + since.seconds
    return seconds - seconds % bucket_seconds
