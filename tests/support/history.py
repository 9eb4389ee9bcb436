"""Create a history by SQL, and last statuses that are older than the history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from nexhb.heartbeat import bucket_of
from nexhb.postgres.connections import Connection

NOW = datetime(2026, 6, 15, 12, 0, 3, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
THESE = "device_no IN (SELECT n FROM (SELECT device_no AS n FROM devices) d WHERE {which})"


async def add_devices(conn: Connection, count: int) -> None:
    """Add kiosk-1 to kiosk-`count`, with these numbers."""
    await conn.execute("INSERT INTO devices (device_id) SELECT 'kiosk-' || n FROM generate_series(1, $1::int) n", count)


async def add_history(conn: Connection, *ages: timedelta, which: str = "true") -> None:
    """Add a heartbeat of each age (before NOW) for the devices n selected by `which`, all with different values."""
    for age in ages:
        ts = NOW - age
        await conn.execute(
            f"""INSERT INTO device_heartbeats
            SELECT $1::timestamptz, $1::timestamptz + n * interval '1 millisecond', n, $2, 1 + (n + $3) % 4, n + $3,
                   CASE WHEN n % 7 > 0 THEN 1000 + n END, 20 + n % 30 / 2.0, (n + $3) % 101, -(n % 90), n % 2 = 0,
                   CASE WHEN n % 3 > 0 THEN n % 3 = 1 END, n % 11 = 0, '10.0.0.0'::inet + n
            FROM (SELECT device_no AS n FROM devices) d WHERE {which}""",
            ts, bucket_of(ts, 10), round(age / MINUTE) % 1_000,
        )  # fmt: skip


async def turn_back(conn: Connection, by: timedelta, which: str = "true") -> None:
    """Replace the statuses of the devices n selected by `which` by the statuses that an older heartbeat would give."""
    await conn.execute(
        f"""UPDATE device_last_status SET last_ts = last_ts - $1::interval, battery_pct = 100, ssid = 'old', ip = NULL
        WHERE {THESE.format(which=which)}""",
        by,
    )


async def numbers(conn: Connection, query: str) -> list[int]:
    """Return the query's only column, of numbers."""
    return [row[0] for row in await conn.fetch(query)]


async def status_of(conn: Connection, number: int) -> dict[str, Any]:
    """Return the device's status row, or an empty dictionary."""
    row = await conn.fetchrow("SELECT * FROM device_last_status WHERE device_no = $1", number)
    return dict(row or {})
