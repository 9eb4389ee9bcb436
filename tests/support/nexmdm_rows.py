"""Single devices and heartbeats of a NexMDM database, with the columns that a test chooses."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bench.nexmdm import CREATED, token_id
from nexhb.postgres.connections import Connection


async def add_device(conn: Connection, device_id: str, token: str = "", **columns: Any) -> None:
    """Insert a device; its hash is a dummy, since a real one takes time and is not needed if there is a token_id."""
    values = {
        "id": device_id, "alias": f"Store {device_id}", "token_hash": "unused", "token_id": token_id(token),
        "created_at": CREATED, "model": "SM-T500", "sdk_int": 33,
    } | columns  # fmt: skip
    names, marks = ", ".join(values), ", ".join(f"${n}" for n in range(1, len(values) + 1))
    await conn.execute(f"INSERT INTO devices ({names}) VALUES ({marks})", *values.values())


async def add_beat(conn: Connection, device_id: str, ts: datetime, **columns: Any) -> None:
    """Insert a heartbeat. NexMDM's column has no zone: PostgreSQL stores the moment in the session's zone."""
    values = {"device_id": device_id, "ts": ts} | columns
    marks = ", ".join(f"${n}" + "::timestamptz" * (name == "ts") for n, name in enumerate(values, start=1))
    await conn.execute(f"INSERT INTO device_heartbeats ({', '.join(values)}) VALUES ({marks})", *values.values())
