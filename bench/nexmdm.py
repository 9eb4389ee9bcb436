"""Create a NexMDM database as its public versions do: with one table of heartbeats, or with a table per day."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import bcrypt

from nexhb.postgres.connections import Connection

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
    """The differences between the versions."""

    name: str
    partitioned: bool = False
    revoked_at: bool = False  # devices.token_revoked_at
    ssid: bool = False

    async def create(self, conn: Connection, first: datetime, last: datetime) -> None:
        """Create the empty tables, with days from `first` to `last`."""
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
        """Create the missing days, if this version has a table per day."""
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
    """Return the token's id as NexMDM stores it."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_hash(token: str, rounds: int = 4) -> str:
    """Return the token's bcrypt hash as NexMDM stores it, but by default with fewer rounds than the 12 of NexMDM."""
    return bcrypt.hashpw(token.encode(), bcrypt.gensalt(rounds)).decode()


async def add_devices(conn: Connection, devices: Sequence[tuple[str, str]]) -> None:
    """Insert many devices, given as (device_id, token)."""
    await conn.copy_records_to_table(
        "devices",
        records=[(i, f"Store {i}", "unused", token_id(t), CREATED) for i, t in devices],
        columns=("id", "alias", "token_hash", "token_id", "created_at"),
    )


async def add_history(conn: Connection, start: datetime, end: datetime, every: timedelta) -> int:
    """Insert one heartbeat of each device per interval, the devices a second apart. Return the number of
    heartbeats."""
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


def naive(moment: datetime) -> datetime:
    """Return the moment in UTC without a zone, as NexMDM's columns have it."""
    return moment.astimezone(UTC).replace(tzinfo=None)
