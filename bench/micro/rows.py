"""Bytes per heartbeat, indexes included: nexhb's schema and the NexMDM layout, the same heartbeats in both."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import asyncpg

from bench import history
from bench.finding import Finding
from bench.fleet import MICROS, Device, make_fleet
from bench.micro.scratch import database, text_table
from bench.report import Limit, hold
from nexhb import partitions, wire

_SEED: Final = 1
_DEVICES: Final = 2_000
_INTERVAL_S: Final = 60
_RATIO: Final = Limit("bytes per heartbeat, of NexMDM's without its dedupe index", "ratio", 0.5)

# facts of sergiogordon/unitymdm-prod (MIT): columns in their order, primary key, the index of every partition
_NEXMDM: Final = """
CREATE TABLE nexmdm_heartbeats (
    hb_id             bigserial,
    device_id         varchar NOT NULL,
    ts                timestamp NOT NULL,
    ip                varchar,
    status            varchar NOT NULL DEFAULT 'ok',
    battery_pct       integer,
    plugged           boolean,
    temp_c            integer,
    network_type      varchar,
    signal_dbm        integer,
    uptime_s          integer,
    ram_used_mb       integer,
    unity_pkg_version varchar,
    unity_running     boolean,
    agent_version     varchar,
    PRIMARY KEY (device_id, ts, hb_id)
);
CREATE INDEX nexmdm_device_ts ON nexmdm_heartbeats (device_id, ts DESC);
"""
# one heartbeat per device and ten seconds, said as it says it
_NEXMDM_DEDUPE: Final = """
CREATE UNIQUE INDEX nexmdm_dedupe ON nexmdm_heartbeats
    (device_id, date_trunc('minute', ts), ((extract(epoch FROM ts)::bigint / 10) % 6))
"""
_NEXMDM_COLUMNS: Final = (
    "device_id",
    "ts",
    "ip",
    "battery_pct",
    "plugged",
    "temp_c",
    "network_type",
    "signal_dbm",
    "uptime_s",
    "ram_used_mb",
    "unity_pkg_version",
    "unity_running",
    "agent_version",
)
_SIZES: Final = """
SELECT pg_table_size($1::text::regclass) AS heap, pg_indexes_size($1::text::regclass) AS indexes
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes per heartbeat."""

    layout: str
    heap: float
    indexes: float

    @property
    def total(self) -> float:
        """Both."""
        return self.heap + self.indexes


async def run(*, quick: bool) -> Finding:
    """Write the same heartbeats in both layouts, a minute's batch at a time, and weigh them."""
    beats = 30 if quick else 120
    async with database() as conn:
        rows, nexhb = await _write_both(conn, beats)
        nexmdm = await _size(conn, "nexmdm_heartbeats", "NexMDM, without its dedupe index", rows)
        # built afterwards it is as dense as can be, so the comparison stays in NexMDM's favour
        await conn.execute(_NEXMDM_DEDUPE)
        with_dedupe = await _size(conn, "nexmdm_heartbeats", "NexMDM, with it", rows)
    return _finding(rows, [nexhb, nexmdm, with_dedupe])


def _finding(rows: int, sizes: Sequence[Size]) -> Finding:
    nexhb, nexmdm, _ = sizes
    table = text_table(
        ("layout", "heap", "indexes", "bytes per heartbeat", "of NexMDM's"),
        [
            (s.layout, f"{s.heap:.1f}", f"{s.indexes:.1f}", f"{s.total:.1f}", f"{s.total / nexmdm.total:.2f}")
            for s in sizes
        ],
    )
    verdict = hold(_RATIO, round(nexhb.total / nexmdm.total, 3))
    title = f"bytes per heartbeat, {rows:,} heartbeats of {_DEVICES:,} devices"
    details = {"rows": rows, "sizes": [{"layout": s.layout, "heap": s.heap, "indexes": s.indexes} for s in sizes]}
    return Finding("micro-rows", title, (verdict,), {"table": table}, details)


async def _write_both(conn: asyncpg.Connection, beats: int) -> tuple[int, Size]:
    """Two hours that lie in one day's partition."""
    fleet = make_fleet(_DEVICES, _SEED)
    end = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)
    table = await _tables(conn, fleet, end.date())
    writer = await history.Writer.of(conn, fleet)
    rows = 0
    for minute in history.minutes_of(_DEVICES, beats, _INTERVAL_S, round(end.timestamp()) * MICROS):
        heartbeats = writer.heartbeats(minute)
        rows += await writer.write(heartbeats, table)
        records = [_nexmdm_row(heartbeat) for heartbeat in heartbeats]
        await conn.copy_records_to_table("nexmdm_heartbeats", records=records, columns=_NEXMDM_COLUMNS)
    return rows, await _size(conn, table, "nexhb", rows)


async def _tables(conn: asyncpg.Connection, fleet: Sequence[Device], day: date) -> str:
    """Devices, the day's partition as the daemon makes it, and the other layout; the partition's name."""
    devices = [(device.device_id, device.alias) for device in fleet]
    await conn.copy_records_to_table("devices", records=devices, columns=("device_id", "alias"))
    await conn.execute(_NEXMDM)
    made = await partitions.ensure(conn, [day])
    return made[day]


def _nexmdm_row(h: wire.Heartbeat) -> tuple[Any, ...]:
    """The row that NexMDM would write of this heartbeat."""
    return (
        h.device_id,
        h.ts.replace(tzinfo=None),
        None if h.ip is None else str(ipaddress.ip_address(h.ip[4:])),
        h.battery_pct,
        h.plugged,
        None if h.temp_c is None else round(h.temp_c),
        h.label.network_type or None,
        h.signal_dbm,
        h.uptime_s,
        h.ram_used_mb,
        h.label.unity_pkg_version or None,
        h.unity_running,
        h.label.agent_version or None,
    )


async def _size(conn: asyncpg.Connection, table: str, layout: str, rows: int) -> Size:
    await conn.execute(f"VACUUM (ANALYZE) {table}")
    found = await conn.fetchrow(_SIZES, table)
    assert found is not None  # noqa: S101 - a SELECT without FROM has one row
    return Size(layout, found["heap"] / rows, found["indexes"] / rows)
