"""The agent's body as a pydantic model: what the FastAPI peers declare. docs/wire.md says what is in it."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pydantic import BaseModel

from bench.fleet import UNITY_PACKAGE

RECENT_S: Final = 600


class App(BaseModel):
    """One of app_versions."""

    installed: bool
    version_name: str | None = None
    version_code: int | None = None


class Battery(BaseModel):
    """Charge and temperature."""

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
    """MiB."""

    total_ram_mb: float | None = None
    avail_ram_mb: float | None = None
    pressure_pct: float | None = None


class Network(BaseModel):
    """How it is connected."""

    transport: str | None = None
    ssid: str | None = None
    carrier: str | None = None
    ip: str | None = None
    signal_dbm: float | None = None


class Heartbeat(BaseModel):
    """The body; what is not named is ignored."""

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

    @property
    def unity(self) -> tuple[str | None, bool | None]:
        """The Unity app's version, and whether it runs."""
        app = self.app_versions.get(UNITY_PACKAGE)
        if app is None or not app.installed:
            return None, None
        running, recent_s = self.unity_process_running, self.monitored_foreground_recent_s
        if running is None and recent_s is not None and recent_s >= 0:
            running = recent_s < RECENT_S
        return app.version_name, running

    @property
    def ram_used_mb(self) -> int | None:
        """What is not available."""
        total, available = self.memory.total_ram_mb, self.memory.avail_ram_mb
        return None if total is None or available is None else int(total - available)


def whole(value: float | None) -> int | None:
    """A column's integer of a number that came as a double."""
    return None if value is None else round(value)
