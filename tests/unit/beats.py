"""Heartbeats for tests that need no body."""

from __future__ import annotations

from datetime import UTC, datetime

from nexhb import wire
from nexhb.wire import DeviceFacts, Heartbeat, Label

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
FACTS = DeviceFacts("Store 42", "13", 33, "2025-09-05", "TP1A.220624.014", "SM-T500", "samsung")
LABEL = Label("1.0.9", "2.1.0", "wifi", "Store-42")


def beat(
    device_no: int = 1,
    ts: datetime = NOON,
    *,
    battery_pct: int | None = 87,
    label: Label = LABEL,
    facts: DeviceFacts = FACTS,
) -> Heartbeat:
    """A valid heartbeat."""
    return Heartbeat(
        device_no=device_no,
        device_id=f"kiosk-{device_no}",
        ts=ts,
        received_at=ts,
        bucket=wire.bucket_of(ts, 10),
        clock_wrong=False,
        label=label,
        battery_pct=battery_pct,
        plugged=True,
        temp_c=31.5,
        ip=wire.pack_ip("192.168.1.50"),
        signal_dbm=-67,
        uptime_s=12_345_678,
        ram_used_mb=1837,
        unity_running=True,
        facts=facts,
        claimed_device_id=None,
        queue_depth=None,
        dropped=(),
    )
