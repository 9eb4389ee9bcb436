"""A NexMDM database as its public versions make it: one table of heartbeats, or one a day."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import bcrypt

from nexhb.db import Connection

CREATED = datetime(2025, 10, 18, 12)  # noqa: DTZ001 - its columns have no zone
DEVICES = """
    CREATE TABLE devices (
        id varchar PRIMARY KEY, alias varchar NOT NULL, app_version varchar, token_hash varchar NOT NULL,
        token_id varchar UNIQUE, {more} created_at timestamp NOT NULL, last_seen timestamp NOT NULL DEFAULT now(),
        model varchar, manufacturer varchar, android_version varchar, sdk_int integer, build_id varchar,
        monitored_package varchar NOT NULL DEFAULT 'org.zwanoo.android.speedtest')"""
COLUMNS = """
    device_id varchar NOT NULL REFERENCES devices, ts timestamp NOT NULL, ip varchar,
    status varchar NOT NULL DEFAULT 'ok', battery_pct integer, plugged boolean, temp_c integer, network_type varchar,
    signal_dbm integer, uptime_s integer, ram_used_mb integer, unity_pkg_version varchar, unity_running boolean,
    agent_version varchar"""


@dataclass(frozen=True)
class Version:
    """What differs between them."""

    name: str
    partitioned: bool = False
    revoked_at: bool = False  # devices.token_revoked_at
    ssid: bool = False

    async def create(self, conn: Connection, first: datetime, last: datetime) -> None:
        """Its tables, empty, with days from `first` to `last`."""
        await conn.execute(DEVICES.format(more="token_revoked_at timestamp," if self.revoked_at else ""))
        ssid = ", ssid varchar" if self.ssid else ""
        if not self.partitioned:
            await conn.execute(f"CREATE TABLE device_heartbeats (hb_id bigserial PRIMARY KEY, {COLUMNS}{ssid})")
            await conn.execute("CREATE INDEX ON device_heartbeats (ts)")
            await conn.execute("CREATE INDEX ON device_heartbeats (device_id)")
            await conn.execute("CREATE INDEX ON device_heartbeats (device_id, ts)")
            return
        await conn.execute(
            f"""CREATE TABLE device_heartbeats (hb_id bigserial, {COLUMNS}{ssid}, PRIMARY KEY (device_id, ts, hb_id))
            PARTITION BY RANGE (ts)"""
        )
        await self.add_days(conn, first, last)

    async def add_days(self, conn: Connection, first: datetime, last: datetime) -> None:
        """Days that it does not have yet, where it has days."""
        for n in range((last.date() - first.date()).days + 1 if self.partitioned else 0):
            day = first.date() + timedelta(days=n)
            name = f"device_heartbeats_{day:%Y%m%d}"
            await conn.execute(
                f"""CREATE TABLE IF NOT EXISTS {name} PARTITION OF device_heartbeats
                FOR VALUES FROM ('{day}') TO ('{day + timedelta(days=1)}');
                CREATE INDEX ON {name} (device_id, ts DESC);
                CREATE UNIQUE INDEX ON {name}
                    (device_id, date_trunc('minute', ts), ((extract(epoch FROM ts)::bigint / 10) % 6))"""
            )


MONOLITHIC = Version("monolithic", revoked_at=True)
PARTITIONED = Version("partitioned", partitioned=True, ssid=True)


def token_id(token: str) -> str:
    """As NexMDM stores it."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_hash(token: str, rounds: int = 4) -> str:
    """Likewise, but with 12 rounds."""
    return bcrypt.hashpw(token.encode(), bcrypt.gensalt(rounds)).decode()


async def add_device(conn: Connection, device_id: str, token: str = "", **columns: Any) -> None:
    """One device; its hash costs time and is of no use where there is a token_id, so it is none then."""
    values = {
        "id": device_id, "alias": f"Store {device_id}", "token_hash": "unused", "token_id": token_id(token),
        "created_at": CREATED, "model": "SM-T500", "sdk_int": 33,
    } | columns  # fmt: skip
    names, marks = ", ".join(values), ", ".join(f"${n}" for n in range(1, len(values) + 1))
    await conn.execute(f"INSERT INTO devices ({names}) VALUES ({marks})", *values.values())


async def add_devices(conn: Connection, devices: Sequence[tuple[str, str]]) -> None:
    """Many: device_id and token."""
    await conn.copy_records_to_table(
        "devices",
        records=[(i, f"Store {i}", "unused", token_id(t), CREATED) for i, t in devices],
        columns=("id", "alias", "token_hash", "token_id", "created_at"),
    )


async def add_history(conn: Connection, start: datetime, end: datetime, every: timedelta) -> int:
    """A heartbeat of each device at each of these times, a second apart by device, in the session's zone; how many."""
    done = await conn.execute(
        """INSERT INTO device_heartbeats (device_id, ts, ip, battery_pct, plugged, temp_c, network_type, uptime_s,
            ram_used_mb, unity_pkg_version, unity_running, agent_version)
        SELECT id, t + n * interval '1.001 second', '10.1.' || n % 200 || '.7', n % 101, n % 2 = 0, 31, 'wifi', n, 1200,
               '2.1.0', n % 50 <> 0, '1.0.' || n % 4
        FROM generate_series($1::timestamptz, $2::timestamptz - $3::interval, $3) t,
             (SELECT id, (row_number() OVER (ORDER BY id))::int AS n FROM devices) d
        ORDER BY t, n""",
        start, end, every,
    )  # fmt: skip
    return int(done.split()[-1])


async def add_beat(conn: Connection, device_id: str, ts: datetime, **columns: Any) -> None:
    """One heartbeat. NexMDM gives its column without a zone a moment: PostgreSQL stores that in the session's zone."""
    values = {"device_id": device_id, "ts": ts} | columns
    marks = ", ".join(f"${n}" + "::timestamptz" * (name == "ts") for n, name in enumerate(values, start=1))
    await conn.execute(f"INSERT INTO device_heartbeats ({', '.join(values)}) VALUES ({marks})", *values.values())


def naive(moment: datetime) -> datetime:
    """UTC, as its columns have it."""
    return moment.astimezone(UTC).replace(tzinfo=None)
