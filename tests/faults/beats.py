"""A heartbeat as a device keeps it, and the row that it must be found as: read from the body that was sent, by none of
nexhb's own code."""

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
_RECENT_S = 600
PHASE_US = 300 * MICROS  # how long a device is as it is: this, or up to six times as long
COLUMNS = (
    "device_id", "ts", "clock_wrong", "battery_pct", "plugged", "temp_c", "network_type", "ssid", "ip", "signal_dbm",
    "uptime_s", "ram_used_mb", "unity_pkg_version", "unity_running", "agent_version",
)  # fmt: skip

Row = tuple[Any, ...]  # in the order of COLUMNS


class Beat(NamedTuple):
    """One heartbeat: whose, and when it was made (µs since 1970). All else follows from these."""

    device: int
    ts_us: int

    @property
    def bucket(self) -> int:
        """The ten seconds that it has for itself."""
        return (self.ts_us - self.ts_us % BUCKET_US) // MICROS - _BUCKETS_FROM_S

    @property
    def at(self) -> datetime:
        """When it was made."""
        return _EPOCH + timedelta(microseconds=self.ts_us)


def beat_at(fleet: Sequence[Device], device: int, at: datetime) -> Beat:
    """The heartbeat that a device makes at `at`, by its own clock's resolution."""
    return Beat(device, fleet[device].made_us((at - _EPOCH) // timedelta(microseconds=1)))


def body_of(fleet: Sequence[Device], beat: Beat) -> bytes:
    """What is sent; the same bytes each time."""
    device = _as_of(fleet[beat.device], beat.ts_us // (PHASE_US * (1 + beat.device % 6)))
    return body_us(device, beat.ts_us, beat.ts_us // BUCKET_US)


@lru_cache(maxsize=4096)
def _as_of(device: Device, phase: int) -> Device:
    """The device in this stretch of its time: its network has a name of its own in each, and its alias goes there and
    back from one to the next."""
    template = device.template
    if phase % 2:
        template = template.replace(b'","app_version"', b' (moved)","app_version"', 1)
    if device.ssid is not None:
        template = template.replace(b'","ip"', b" %d" % (phase % 1000) + b'","ip"', 1)
    return replace(device, template=template)


def row_of(fleet: Sequence[Device], beat: Beat) -> Row:
    """As it must be found."""
    said = json.loads(body_of(fleet, beat))
    battery, network, memory = said["battery"], said["network"], said["memory"]
    unity = said["app_versions"][UNITY_PACKAGE]
    signal = said.get("signal_dbm", network.get("signal_dbm"))
    return (
        said["device_id"], beat.at, False, int(battery["pct"]), battery["charging"], float32(battery["temperature_c"]),
        network["transport"], network.get("ssid"), str(ipaddress.ip_address(network["ip"])),
        None if signal is None else int(signal), int(said["system"]["uptime_seconds"]),
        int(memory["total_ram_mb"] - memory["avail_ram_mb"]), unity.get("version_name"), _running(said, unity),
        said["app_version"],
    )  # fmt: skip


def facts_of(fleet: Sequence[Device], beat: Beat) -> Row:
    """What it says of the device itself."""
    said = json.loads(body_of(fleet, beat))
    system = said["system"]
    return (
        said["alias"], system["android_version"], int(system["sdk_int"]), system["patch_level"], system["build_id"],
        system["model"], system["manufacturer"],
    )  # fmt: skip


def _running(said: dict[str, Any], unity: dict[str, Any]) -> bool | None:
    if not unity["installed"]:
        return None
    if said.get("unity_process_running") is not None:
        return bool(said["unity_process_running"])
    recent = said.get("monitored_foreground_recent_s", -1)
    return None if recent < 0 else recent < _RECENT_S


def float32(value: float) -> float:
    """As PostgreSQL's real keeps it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
