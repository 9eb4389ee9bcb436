"""Create heartbeats for tests that do not need a request's body."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from nexhb.heartbeat import DeviceFacts, Heartbeat, Key, Label, bucket_of
from nexhb.ingest.batch import RecentKeys
from nexhb.postgres.codecs import pack_ip

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
MIDNIGHT = NOON.replace(hour=0)
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
    """Return a valid heartbeat."""
    return Heartbeat(
        device_no=device_no,
        device_id=f"kiosk-{device_no}",
        ts=ts,
        received_at=ts,
        bucket=bucket_of(ts, 10),
        clock_wrong=False,
        label=label,
        battery_pct=battery_pct,
        plugged=True,
        temp_c=31.5,
        ip=pack_ip("192.168.1.50"),
        signal_dbm=-67,
        uptime_s=12_345_678,
        ram_used_mb=1837,
        unity_running=True,
        facts=facts,
        claimed_device_id=None,
        queue_depth=None,
        dropped=(),
    )


def recent_of(keys: Iterable[Key], capacity: int = 1_000) -> RecentKeys:
    """Return a RecentKeys that contains these keys."""
    recent = RecentKeys(capacity)
    recent.add(keys)
    return recent


# Heartbeats of at most four devices, within half a minute of midnight, so that many share a device, a bucket or a day.
AROUND_MIDNIGHT = st.lists(
    st.builds(
        beat,
        st.integers(1, 4),
        st.integers(-30_000, 30_000).map(lambda ms: MIDNIGHT + timedelta(milliseconds=ms)),
        battery_pct=st.integers(0, 100),
    ),
    max_size=30,
)
