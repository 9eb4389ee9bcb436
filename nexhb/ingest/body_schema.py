"""The form of a request's body: its fields, their types and their limits. Pure.

There are two schemas. The strict one fits the usual body: its decoder checks every type, length and range (1.0 µs),
so that no further check is needed. The loose one, the same without the limits of numbers, is used if the strict one
fails: it accepts every body that may be a heartbeat. The fields of such a body are then checked one by one, so that
each error is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, get_args

import msgspec

from nexhb.heartbeat import (
    COLUMNS,
    INT32_MAX,
    Column,
)

# The fields with limits; a field has the limits of the column in which it is stored. Errors are listed in this order.
STORED_IN = {
    "memory.total_ram_mb": COLUMNS["ram_used_mb"],
    "memory.avail_ram_mb": COLUMNS["ram_used_mb"],
    "app_version": COLUMNS["agent_version"],
    "network.transport": COLUMNS["network_type"],
    "network.ssid": COLUMNS["ssid"],
    "battery.pct": COLUMNS["battery_pct"],
    "battery.temperature_c": COLUMNS["temp_c"],
    "signal_dbm": COLUMNS["signal_dbm"],
    "system.uptime_seconds": COLUMNS["uptime_s"],
    "alias": COLUMNS["alias"],
    "system.android_version": COLUMNS["android_version"],
    "system.sdk_int": COLUMNS["sdk_int"],
    "system.patch_level": COLUMNS["patch_level"],
    "system.build_id": COLUMNS["build_id"],
    "system.model": COLUMNS["model"],
    "system.manufacturer": COLUMNS["manufacturer"],
}
# Fields that are not stored themselves.
RECENT_S = Column("unity_running", "integer", limits=(-INT32_MAX, INT32_MAX))
DEPTH = (0, INT32_MAX)


def _within(column: Column) -> msgspec.Meta:
    """Return the strict schema's limits of a value for this column. A number may have a fraction if it rounds, halves
    to even, to an integer within the limits: 100.5 becomes 100, and -0.5 becomes 0."""
    low, high = column.limits
    if column.type == "text":
        return msgspec.Meta(max_length=int(high))
    if column.type == "real":
        return msgspec.Meta(gt=low, lt=high)
    lowest = low - 0.5 if low % 2 == 0 else math.nextafter(low - 0.5, math.inf)
    highest = high + 0.5 if high % 2 == 0 else math.nextafter(high + 0.5, -math.inf)
    return msgspec.Meta(ge=lowest, le=highest)


def _limits_of(path: str) -> msgspec.Meta:
    return _within(STORED_IN[path])


_Zoned = Annotated[datetime, msgspec.Meta(tz=True)]


class Battery(msgspec.Struct, gc=False):
    pct: Annotated[float, _limits_of("battery.pct")] | None = None
    charging: bool | None = None
    temperature_c: Annotated[float, _limits_of("battery.temperature_c")] | None = None


class System(msgspec.Struct, gc=False):
    uptime_seconds: Annotated[float, _limits_of("system.uptime_seconds")] | None = None
    android_version: Annotated[str, _limits_of("system.android_version")] | None = None
    sdk_int: Annotated[float, _limits_of("system.sdk_int")] | None = None
    patch_level: Annotated[str, _limits_of("system.patch_level")] | None = None
    build_id: Annotated[str, _limits_of("system.build_id")] | None = None
    model: Annotated[str, _limits_of("system.model")] | None = None
    manufacturer: Annotated[str, _limits_of("system.manufacturer")] | None = None


class Memory(msgspec.Struct, gc=False):
    total_ram_mb: Annotated[float, _limits_of("memory.total_ram_mb")] | None = None
    avail_ram_mb: Annotated[float, _limits_of("memory.avail_ram_mb")] | None = None


class Network(msgspec.Struct, gc=False):
    transport: Annotated[str, _limits_of("network.transport")] | None = None
    ssid: Annotated[str, _limits_of("network.ssid")] | None = None
    ip: Annotated[str, msgspec.Meta(max_length=100)] | None = None
    signal_dbm: Annotated[float, _limits_of("signal_dbm")] | None = None


class App(msgspec.Struct, gc=False):
    installed: bool | None = None
    version_name: Annotated[str, _within(COLUMNS["unity_pkg_version"])] | None = None


class Body(msgspec.Struct, gc=False, kw_only=True):
    # In the agent's order: the decoder expects the next field after the last one.
    device_id: str | None = None
    alias: Annotated[str, _limits_of("alias")] | None = None
    app_version: Annotated[str, _limits_of("app_version")] | None = None
    timestamp_utc: _Zoned
    app_versions: dict[str, App | None] | None = None
    battery: Battery | None = None
    system: System | None = None
    memory: Memory | None = None
    network: Network | None = None
    queue_depth: Annotated[float, msgspec.Meta(ge=DEPTH[0], le=DEPTH[1])] | None = None
    signal_dbm: Annotated[float, _limits_of("signal_dbm")] | None = None
    monitored_foreground_recent_s: Annotated[float, _within(RECENT_S)] | None = None
    unity_process_running: bool | None = None


class TimestampOnly(msgspec.Struct, gc=False):
    timestamp_utc: _Zoned


def _without_limits(strict: type[msgspec.Struct], **unread: Any) -> type[msgspec.Struct]:
    """Return a struct like `strict` whose numbers, also in its sections, have no limits. `unread`: other types for
    fields whose content is no reason to refuse the body."""
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(strict):
        kind, *_ = get_args(field.type) or (field.type,)
        if field.name in unread:
            kind = unread[field.name]
            fields.append((field.name, kind, msgspec.Raw() if kind is msgspec.Raw else None))
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            fields.append((field.name, _without_limits(kind) | None, None))
        elif get_args(kind)[:1] == (float,):  # Annotated
            fields.append((field.name, float | None, None))
        else:
            fields.append((field.name, field.type, field.default))
    return msgspec.defstruct(f"_Loose{strict.__name__}", fields, gc=False, kw_only=True)


# _repaired replaces the unread fields by values of the types in Body.
_LooseBody = _without_limits(
    Body, device_id=msgspec.Raw, queue_depth=msgspec.Raw, app_versions=dict[str, msgspec.Raw] | None
)
decode_body = msgspec.json.Decoder(Body).decode
decode_bodies = msgspec.json.Decoder(list[Body]).decode
decode_loose: Callable[[bytes], Any] = msgspec.json.Decoder(_LooseBody).decode
decode_timestamp = msgspec.json.Decoder(TimestampOnly).decode
decode_app = msgspec.json.Decoder(App | None).decode
decode_anything = msgspec.json.Decoder().decode
decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
NO_BATTERY, NO_SYSTEM, NO_MEMORY, NO_NETWORK = Battery(), System(), Memory(), Network()
