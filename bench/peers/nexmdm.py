"""The heartbeat of the public NexMDM server, rebuilt from what its source does (sergiogordon/unitymdm-prod, MIT: facts,
none of its code): token_id lookup, bcrypt check, INSERT … WHERE NOT EXISTS over the ten seconds, upsert of the last
status, the device's own row with the whole body as JSON, a second look at the last status, commit.

As there, the endpoint is a coroutine that calls a blocking session, so that one request is served at a time; with
`--threads` it is a plain function, which FastAPI runs on threads. Its tables are those of `bench.nexmdm`.

Left out, each to its favour: log lines and printing, events, the lookup of monitoring settings, its ORM's entities. One
thing differs: the bucket is that of the heartbeat's own time and not of its arrival, or else much of a load on few
devices would be duplicates. Needs the extra `compare`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import asyncpg
import bcrypt
from fastapi import FastAPI, Header, HTTPException
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from bench import nexmdm
from bench.fleet import Device
from bench.peers.body import Heartbeat, whole
from bench.peers.fastapi_insert import serve

_ROUNDS: Final = 12
_BUCKET: Final = timedelta(seconds=10)
_STATUS: Final = """
CREATE TABLE device_last_status (device_id varchar PRIMARY KEY, last_ts timestamp NOT NULL, battery_pct integer,
    network_type varchar, unity_running boolean, signal_dbm integer, agent_version varchar, ip varchar, status varchar,
    service_up boolean, monitored_foreground_recent_s integer, monitored_package varchar);
ALTER TABLE devices ADD last_status text, ADD is_device_owner boolean;
"""
_DEVICE: Final = text("SELECT id, token_hash, last_status, monitored_package FROM devices WHERE token_id = :token_id")
_KNOWN: Final = text("""
UPDATE devices SET last_seen = :now, last_status = :last_status, app_version = :agent_version, model = :model,
    manufacturer = :manufacturer, android_version = :android_version, sdk_int = :sdk_int, build_id = :build_id,
    is_device_owner = true
WHERE id = :device_id
""")
_INSERT: Final = text("""
INSERT INTO device_heartbeats (device_id, ts, ip, status, battery_pct, plugged, temp_c, network_type, signal_dbm,
    uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version)
SELECT CAST(:device_id AS varchar), :ts, :ip, 'ok', :battery_pct, :plugged, :temp_c, :network_type, :signal_dbm,
    :uptime_s, :ram_used_mb, :unity_pkg_version, :unity_running, :agent_version
WHERE NOT EXISTS (
    SELECT FROM device_heartbeats WHERE device_id = CAST(:device_id AS varchar) AND ts >= :first AND ts < :behind)
RETURNING hb_id
""")
_UPSERT: Final = text("""
INSERT INTO device_last_status (device_id, last_ts, battery_pct, network_type, unity_running, signal_dbm, agent_version,
    ip, status)
VALUES (:device_id, :ts, :battery_pct, :network_type, :unity_running, :signal_dbm, :agent_version, :ip, 'ok')
ON CONFLICT (device_id) DO UPDATE SET last_ts = EXCLUDED.last_ts, battery_pct = EXCLUDED.battery_pct,
    network_type = EXCLUDED.network_type, unity_running = EXCLUDED.unity_running, signal_dbm = EXCLUDED.signal_dbm,
    agent_version = EXCLUDED.agent_version, ip = EXCLUDED.ip, status = EXCLUDED.status
""")
_BEFORE: Final = text("SELECT device_id, service_up FROM device_last_status WHERE device_id = :device_id")
_SERVICE: Final = text("""
UPDATE device_last_status SET service_up = :unity_running, monitored_foreground_recent_s = :recent_s,
    monitored_package = :package
WHERE device_id = :device_id
""")


async def prepare(conn: asyncpg.Connection, fleet: Sequence[Device], hashed: int, first: datetime) -> None:
    """Its tables with days from `first` to tomorrow, and the fleet; the first `hashed` devices have a real hash."""
    await nexmdm.PARTITIONED.create(conn, first, datetime.now(UTC) + timedelta(days=1))
    await conn.execute(_STATUS)
    await nexmdm.add_devices(conn, [(device.device_id, device.token) for device in fleet])
    with ThreadPoolExecutor() as threads:
        # a quarter of a second each
        hashes = list(threads.map(lambda device: nexmdm.token_hash(device.token, _ROUNDS), fleet[:hashed]))
    pairs = [(made, device.device_id) for made, device in zip(hashes, fleet, strict=False)]
    await conn.executemany("UPDATE devices SET token_hash = $1 WHERE id = $2", pairs)


def _values(body: Heartbeat) -> dict[str, Any]:
    battery, network, ts = body.battery, body.network, nexmdm.naive(body.timestamp_utc)
    version, running = body.unity
    first = ts.replace(second=ts.second // 10 * 10, microsecond=0)
    return {
        "ts": ts, "first": first, "behind": first + _BUCKET, "ip": network.ip, "battery_pct": whole(battery.pct),
        "plugged": battery.charging, "temp_c": whole(battery.temperature_c), "network_type": network.transport,
        "signal_dbm": whole(network.signal_dbm), "uptime_s": whole(body.system.uptime_seconds),
        "ram_used_mb": body.ram_used_mb, "unity_pkg_version": version, "unity_running": running,
        "agent_version": body.app_version, "now": nexmdm.naive(datetime.now(UTC)),
        "recent_s": body.monitored_foreground_recent_s, "last_status": body.model_dump_json(),
        "model": body.system.model, "manufacturer": body.system.manufacturer, "build_id": body.system.build_id,
        "android_version": body.system.android_version, "sdk_int": whole(body.system.sdk_int),
    }  # fmt: skip


def _endpoint(dsn: str, *, check_hash: bool, pool_size: int) -> Callable[[Heartbeat, str], dict[str, Any]]:
    """What one request does, start to end, blocking."""
    engine = create_engine(
        dsn.replace("postgresql://", "postgresql+psycopg://", 1),
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"options": "-c synchronous_commit=on -c timezone=UTC"},
    )

    def take(body: Heartbeat, token: str) -> dict[str, Any]:
        with Session(engine) as session:
            device = session.execute(_DEVICE, {"token_id": nexmdm.token_id(token)}).first()
            if device is None or (check_hash and not bcrypt.checkpw(token.encode(), device.token_hash.encode())):
                raise HTTPException(401)
            if device.last_status:
                json.loads(device.last_status)  # it looks for what has changed
            values = {"device_id": device.id, "package": device.monitored_package, **_values(body)}
            session.execute(_KNOWN, values)
            created = session.execute(_INSERT, values).first() is not None
            session.execute(_UPSERT, values)
            session.execute(_BEFORE, values).first()
            session.execute(_SERVICE, values)
            session.commit()
        return {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": not created}

    return take


def make_app(dsn: str, *, check_hash: bool, threads: bool) -> FastAPI:
    """The one route."""
    take = _endpoint(dsn, check_hash=check_hash, pool_size=10 if threads else 1)

    async def blocking(body: Heartbeat, authorization: Annotated[str, Header()]) -> dict[str, Any]:
        return take(body, authorization.removeprefix("Bearer "))

    def on_a_thread(body: Heartbeat, authorization: Annotated[str, Header()]) -> dict[str, Any]:
        return take(body, authorization.removeprefix("Bearer "))

    app = FastAPI()
    app.add_api_route("/v1/heartbeat", on_a_thread if threads else blocking, methods=["POST"])
    return app


def main() -> None:
    """Serve on 127.0.0.1 until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--no-bcrypt", action="store_true", help="believe the token_id alone")
    parser.add_argument("--threads", action="store_true", help="a plain function, on threads")
    args = parser.parse_args()
    serve(make_app(args.dsn, check_hash=not args.no_bcrypt, threads=args.threads), args.port)


if __name__ == "__main__":
    main()
