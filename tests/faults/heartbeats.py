"""A heartbeat as a device keeps it, and the row that must be stored for it. The row is computed from the body that was
sent, without any of nexhb's own code."""

from __future__ import annotations

import ipaddress
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from bench.fleet import BUCKET_US, MICROS, UNITY_PACKAGE, Device, body_us

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BUCKETS_FROM_S = 1_577_836_800  # 2020-01-01
_RECENT_S = 600  # the Unity app counts as running if it was in the foreground within this time
PHASE_US = 300 * MICROS  # a device's properties stay the same for one to six times this long
COLUMNS = (
    "device_id", "ts", "clock_wrong", "battery_pct", "plugged", "temp_c", "network_type", "ssid", "ip", "signal_dbm",
    "uptime_s", "ram_used_mb", "unity_pkg_version", "unity_running", "agent_version",
)  # fmt: skip

Row = tuple[Any, ...]  # in the order of COLUMNS


class Heartbeat(NamedTuple):
    """One heartbeat: the number of its device, and the time at which it was made (µs since 1970). All its other
    values follow from these two."""

    device: int
    ts_us: int

    @property
    def bucket(self) -> int:
        """The start of the heartbeat's ten-second bucket, in seconds since 2020-01-01. A device makes at most one
        heartbeat in each bucket."""
        return (self.ts_us - self.ts_us % BUCKET_US) // MICROS - _BUCKETS_FROM_S

    @property
    def at(self) -> datetime:
        """The time at which the heartbeat was made."""
        return _EPOCH + timedelta(microseconds=self.ts_us)


def heartbeat_at(fleet: Sequence[Device], device: int, at: datetime) -> Heartbeat:
    """Return the heartbeat that a device makes at `at`, in the resolution of the device's clock."""
    return Heartbeat(device, fleet[device].made_us((at - _EPOCH) // timedelta(microseconds=1)))


def body_of(fleet: Sequence[Device], heartbeat: Heartbeat) -> bytes:
    """Return the body of a heartbeat's request: the same bytes at each call."""
    device = _as_of(fleet[heartbeat.device], heartbeat.ts_us // (PHASE_US * (1 + heartbeat.device % 6)))
    return body_us(device, heartbeat.ts_us, heartbeat.ts_us // BUCKET_US)


@lru_cache(maxsize=4096)
def _as_of(device: Device, phase: int) -> Device:
    """Return the device with the properties of this phase (see PHASE_US): each phase has its own network name, and the
    alias alternates between two values from one phase to the next."""
    fields, network = dict(device.fields), dict(device.network)
    if phase % 2:
        fields["alias"] += " (moved)"
    if "ssid" in network:
        network["ssid"] += f" {phase % 1000}"
    return replace(device, fields=fields, network=network)


def row_of(fleet: Sequence[Device], heartbeat: Heartbeat) -> Row:
    """Return the row that must be stored for the heartbeat."""
    body = json.loads(body_of(fleet, heartbeat))
    battery, network, memory = body["battery"], body["network"], body["memory"]
    unity = body["app_versions"][UNITY_PACKAGE]
    signal = body.get("signal_dbm", network.get("signal_dbm"))
    return (
        body["device_id"], heartbeat.at, False, int(battery["pct"]), battery["charging"],
        float32(battery["temperature_c"]), network["transport"], network.get("ssid"),
        str(ipaddress.ip_address(network["ip"])), None if signal is None else int(signal),
        int(body["system"]["uptime_seconds"]), int(memory["total_ram_mb"] - memory["avail_ram_mb"]),
        unity.get("version_name"), _running(body, unity), body["app_version"],
    )  # fmt: skip


def facts_of(fleet: Sequence[Device], heartbeat: Heartbeat) -> Row:
    """Return what the heartbeat states about the device itself, from its alias to its manufacturer."""
    body = json.loads(body_of(fleet, heartbeat))
    system = body["system"]
    return (
        body["alias"], system["android_version"], int(system["sdk_int"]), system["patch_level"], system["build_id"],
        system["model"], system["manufacturer"],
    )  # fmt: skip


def _running(body: dict[str, Any], unity: dict[str, Any]) -> bool | None:
    if not unity["installed"]:
        return None
    if body.get("unity_process_running") is not None:
        return bool(body["unity_process_running"])
    recent = body.get("monitored_foreground_recent_s", -1)
    return None if recent < 0 else recent < _RECENT_S


def float32(value: float) -> float:
    """Return the value as PostgreSQL's type `real` stores it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
