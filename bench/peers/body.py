"""The agent's body as a pydantic model, for the FastAPI peers. docs/wire.md describes its fields."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel

from bench.fleet import UNITY_PACKAGE

RECENT_S: Final = 600


class App(BaseModel):
    """One item of app_versions."""

    installed: bool
    version_name: str | None = None
    version_code: int | None = None


class Battery(BaseModel):
    """Charge and temperature of the battery."""

    pct: float | None = None
    charging: bool | None = None
    temperature_c: float | None = None


class System(BaseModel):
    """The device and its software."""

    uptime_seconds: float | None = None
    android_version: str | None = None
    sdk_int: float | None = None
    patch_level: str | None = None
    build_id: str | None = None
    model: str | None = None
    manufacturer: str | None = None


class Memory(BaseModel):
    """Memory in MiB."""

    total_ram_mb: float | None = None
    avail_ram_mb: float | None = None
    pressure_pct: float | None = None


class Network(BaseModel):
    """The device's network connection."""

    transport: str | None = None
    ssid: str | None = None
    carrier: str | None = None
    ip: str | None = None
    signal_dbm: float | None = None


class Heartbeat(BaseModel):
    """The body of a heartbeat; other fields are ignored."""

    device_id: str
    alias: str | None = None
    app_version: str | None = None
    timestamp_utc: datetime
    app_versions: dict[str, App] = {}
    battery: Battery = Battery()
    system: System = System()
    memory: Memory = Memory()
    network: Network = Network()
    signal_dbm: float | None = None
    unity_process_running: bool | None = None
    monitored_foreground_recent_s: int | None = None

    def columns(self) -> dict[str, Any]:
        """Return the columns of a row, apart from device and time."""
        app, recent_s, running = self.app_versions.get(UNITY_PACKAGE), self.monitored_foreground_recent_s, None
        if app is not None and app.installed:
            running = self.unity_process_running
            if running is None and recent_s is not None and recent_s >= 0:
                running = recent_s < RECENT_S
        total_mb, available_mb = self.memory.total_ram_mb, self.memory.avail_ram_mb
        signal = self.network.signal_dbm if self.signal_dbm is None else self.signal_dbm
        return {
            "battery_pct": whole(self.battery.pct),
            "plugged": self.battery.charging,
            "temp_c": self.battery.temperature_c,
            "network_type": self.network.transport,
            "ssid": self.network.ssid,
            "ip": self.network.ip,
            "signal_dbm": whole(signal),
            "uptime_s": whole(self.system.uptime_seconds),
            "ram_used_mb": None if total_mb is None or available_mb is None else int(total_mb - available_mb),
            "unity_pkg_version": app.version_name if app is not None and app.installed else None,
            "unity_running": running,
            "agent_version": self.app_version,
        }


def whole(value: float | None) -> int | None:
    """Return the integer of a column for a number that was sent as a double."""
    return None if value is None else round(value)
