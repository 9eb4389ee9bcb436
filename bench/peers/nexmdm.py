"""The heartbeat endpoint of the public NexMDM server, rebuilt from the steps of its source (sergiogordon/unitymdm-prod,
MIT; none of its code is used): token_id lookup, bcrypt check, INSERT … WHERE NOT EXISTS over the ten-second bucket,
upsert of the last status, update of the device's own row with the whole body as JSON, a second query of the last
status, commit.

As in NexMDM, the endpoint is a coroutine that calls a blocking session, so that one request is served at a time. Its
tables are those of `bench.nexmdm`.

These parts are left out, each of which makes the peer faster: log messages and printing, events, the lookup of
monitoring settings, the entities of its ORM. One thing differs: the bucket is that of the heartbeat's timestamp and not
of its arrival; otherwise much of a load on few devices would be duplicates. The peer needs the extra `compare`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
    SELECT FROM device_heartbeats WHERE device_id = CAST(:device_id AS varchar) AND ts >= :first AND ts < :end)
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
    """Create the tables with days from `first` on and insert the fleet; the first `hashed` devices have a real bcrypt
    hash."""
    await nexmdm.PARTITIONED.create(conn, first, datetime.now(UTC) + timedelta(days=1))
    await conn.execute(_STATUS)
    await nexmdm.add_devices(conn, [(device.device_id, device.token) for device in fleet])
    with ThreadPoolExecutor() as threads:
        # each hash takes a quarter of a second
        hashes = list(threads.map(lambda device: nexmdm.token_hash(device.token, _ROUNDS), fleet[:hashed]))
    pairs = [(made, device.device_id) for made, device in zip(hashes, fleet, strict=False)]
    await conn.executemany("UPDATE devices SET token_hash = $1 WHERE id = $2", pairs)


def _values(body: Heartbeat) -> dict[str, Any]:
    ts, system = nexmdm.naive(body.timestamp_utc), body.system
    first, columns = ts.replace(second=ts.second // 10 * 10, microsecond=0), body.columns()
    return columns | {
        "ts": ts,
        "first": first,
        "end": first + _BUCKET,
        "temp_c": whole(columns["temp_c"]),
        "now": nexmdm.naive(datetime.now(UTC)),
        "recent_s": body.monitored_foreground_recent_s,
        "last_status": body.model_dump_json(),
        "model": system.model,
        "manufacturer": system.manufacturer,
        "build_id": system.build_id,
        "android_version": system.android_version,
        "sdk_int": whole(system.sdk_int),
    }


def make_app(dsn: str, *, check_hash: bool) -> FastAPI:
    """Return an application with one route."""
    settings = {"options": "-c synchronous_commit=on -c timezone=UTC"}
    url = dsn.replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(url, pool_size=1, max_overflow=0, connect_args=settings)

    async def heartbeat(body: Heartbeat, authorization: Annotated[str, Header()]) -> dict[str, Any]:
        token = authorization.removeprefix("Bearer ")
        with Session(engine) as session:
            device = session.execute(_DEVICE, {"token_id": nexmdm.token_id(token)}).first()
            if device is None or (check_hash and not bcrypt.checkpw(token.encode(), device.token_hash.encode())):
                raise HTTPException(401)
            if device.last_status:
                json.loads(device.last_status)  # NexMDM parses the last status to find the changes
            values = {"device_id": device.id, "package": device.monitored_package, **_values(body)}
            session.execute(_KNOWN, values)
            created = session.execute(_INSERT, values).first() is not None
            session.execute(_UPSERT, values)
            session.execute(_BEFORE, values).first()
            session.execute(_SERVICE, values)
            session.commit()
        return {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": not created}

    app = FastAPI()
    app.add_api_route("/v1/heartbeat", heartbeat, methods=["POST"])
    return app


def main() -> None:
    """Serve on 127.0.0.1 until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--no-bcrypt", action="store_true", help="accept a token by its token_id, without bcrypt")
    args = parser.parse_args()
    serve(make_app(args.dsn, check_hash=not args.no_bcrypt), args.port)


if __name__ == "__main__":
    main()
