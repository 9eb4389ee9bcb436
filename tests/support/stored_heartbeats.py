"""Heartbeats of a known history, stored without a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from nexhb.postgres.connections import Connection
from tests.support.uptime_truth import Sent


async def store(conn: Connection, device_no: int, sent: Sequence[Sent]) -> None:
    """Store heartbeats as the writer does, with the ledger."""
    await conn.execute(
        "INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)"
        " VALUES ('1', '', '', '') ON CONFLICT DO NOTHING"
    )
    await conn.copy_records_to_table(
        "device_heartbeats",
        records=[
            (
                moment(one.at), moment(one.received), device_no, int(one.at) - 1_577_836_800, 1, one.uptime_s,
                one.battery, one.unity, False,
            )
            for one in sent
        ],
        columns=("ts", "received_at", "device_no", "bucket", "label_no", "uptime_s", "battery_pct", "unity_running",
                 "clock_wrong"),
    )  # fmt: skip
    await conn.execute(
        """INSERT INTO ingest_ledger AS l SELECT day, 0, count(*), 0
           FROM (SELECT (to_timestamp(at) AT TIME ZONE 'UTC')::date AS day FROM unnest($1::float8[]) at) d GROUP BY day
           ON CONFLICT (day, slot) DO UPDATE SET written = l.written + excluded.written""",
        [one.at for one in sent],
    )
    if sent:
        await conn.execute(
            """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at)
               SELECT device_no, device_id, $2, $2, $2 FROM devices WHERE device_no = $1
               ON CONFLICT (device_no) DO UPDATE SET heard_at = $2""",
            device_no,
            moment(max(one.received for one in sent)),
        )


def moment(seconds: float) -> datetime:
    """Return the time of these seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)
