"""The simplest solution as a peer: FastAPI, a pydantic model, an asyncpg pool; each request looks up its token, inserts
its heartbeat and upserts the last status, in one transaction.

The peer is one process on uvloop and httptools, as nexhb is one process. Its tables are as simple as its code, without
the indexes that nexhb's reads need. The peer needs the extra `compare`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Final

import asyncpg
import uvicorn
from fastapi import FastAPI, Header, HTTPException

from bench.fleet import Device
from bench.peers.body import Heartbeat

_BUCKET_S: Final = 10
_VALUES: Final = """
    battery_pct smallint, plugged boolean, temp_c real, network_type text, ssid text, ip inet, signal_dbm smallint,
    uptime_s integer, ram_used_mb integer, unity_pkg_version text, unity_running boolean, agent_version text"""
_NAMES: Final = ", ".join(column.split()[0] for column in _VALUES.split(","))
SCHEMA: Final = f"""
CREATE TABLE tokens (token_sha256 bytea PRIMARY KEY, device_id text NOT NULL);
CREATE TABLE heartbeats (device_id text, bucket bigint, ts timestamptz NOT NULL, {_VALUES},
    PRIMARY KEY (device_id, bucket));
CREATE TABLE last_status (device_id text PRIMARY KEY, last_ts timestamptz NOT NULL, {_VALUES}) WITH (fillfactor = 85);
"""
_TOKEN: Final = "SELECT device_id FROM tokens WHERE token_sha256 = $1"  # noqa: S105 - a statement
_INSERT: Final = f"""
INSERT INTO heartbeats (device_id, bucket, ts, {_NAMES})
VALUES ({", ".join(f"${n}" for n in range(1, 16))}) ON CONFLICT DO NOTHING
"""
_UPSERT: Final = f"""
INSERT INTO last_status AS s (device_id, last_ts, {_NAMES}) VALUES ({", ".join(f"${n}" for n in range(1, 15))})
ON CONFLICT (device_id) DO UPDATE SET (last_ts, {_NAMES}) = ROW (EXCLUDED.last_ts,
    {", ".join(f"EXCLUDED.{name}" for name in _NAMES.split(", "))})
WHERE EXCLUDED.last_ts > s.last_ts
"""


async def prepare(conn: asyncpg.Connection, fleet: Sequence[Device]) -> None:
    """Create the tables and insert the fleet's tokens."""
    await conn.execute(SCHEMA)
    tokens = [(hashlib.sha256(device.token.encode()).digest(), device.device_id) for device in fleet]
    await conn.copy_records_to_table("tokens", records=tokens)


def make_app(dsn: str, pool_size: int) -> FastAPI:
    """Return an application with one route and a pool of `pool_size` connections."""
    pools: list[asyncpg.Pool] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        settings = {"synchronous_commit": "on", "timezone": "UTC"}
        async with asyncpg.create_pool(dsn, min_size=pool_size, max_size=pool_size, server_settings=settings) as pool:
            pools.append(pool)
            yield

    async def heartbeat(body: Heartbeat, authorization: Annotated[str, Header()]) -> dict[str, Any]:
        digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
        values = body.columns().values()
        async with pools[0].acquire() as conn, conn.transaction():
            device_id = await conn.fetchval(_TOKEN, digest)
            if device_id is None:
                raise HTTPException(401)
            bucket = int(body.timestamp_utc.timestamp()) // _BUCKET_S
            done = await conn.execute(_INSERT, device_id, bucket, body.timestamp_utc, *values)
            await conn.execute(_UPSERT, device_id, body.timestamp_utc, *values)
        return {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": done == "INSERT 0 0"}

    app = FastAPI(lifespan=lifespan)
    app.add_api_route("/v1/heartbeat", heartbeat, methods=["POST"])
    return app


def serve(app: FastAPI, port: int) -> None:
    """Run an app with uvicorn's fastest settings."""
    options: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "ws": "none", "backlog": 4096}
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning", **options)


def main() -> None:
    """Serve on 127.0.0.1 until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--pool", type=int, required=True)
    args = parser.parse_args()
    serve(make_app(args.dsn, args.pool), args.port)


if __name__ == "__main__":
    main()
