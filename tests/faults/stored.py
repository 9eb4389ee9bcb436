"""What the database holds of a run, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.fleet import Device
from tests.faults.beats import COLUMNS, Row

Key = tuple[int, int]  # the device's number in the fleet, and the bucket

_HISTORY = f"SELECT bucket, {', '.join(COLUMNS)} FROM heartbeat_history"
_STATUS = f"SELECT {', '.join(COLUMNS)} FROM (SELECT *, last_ts AS ts FROM device_last_status) s"
_FACTS = "SELECT device_id, alias, android_version, sdk_int, patch_level, build_id, model, manufacturer FROM devices"


@dataclass
class Stored:
    """Rows of the history by key, the last status and the facts of each device."""

    rows: dict[Key, list[Row]]
    statuses: dict[int, Row]
    facts: dict[int, Row]


async def read(conn: asyncpg.Connection, fleet: Sequence[Device], _folder: Path) -> Stored:
    """Everything."""
    numbers = {device.device_id: number for number, device in enumerate(fleet)}
    rows: dict[Key, list[Row]] = {}
    async with conn.transaction(isolation="repeatable_read"):
        for record in await conn.fetch(_HISTORY):
            rows.setdefault((numbers[record["device_id"]], record["bucket"]), []).append(_row(record))
        statuses = {numbers[record["device_id"]]: _row(record) for record in await conn.fetch(_STATUS)}
        facts = {numbers[record["device_id"]]: tuple(record)[1:] for record in await conn.fetch(_FACTS)}
    return Stored(rows, statuses, facts)


def _row(record: asyncpg.Record) -> Row:
    return tuple(str(record[name]) if name == "ip" and record[name] else record[name] for name in COLUMNS)
