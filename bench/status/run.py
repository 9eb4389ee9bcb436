"""The run: a daemon on a last status of a million rows, its lists asked over HTTP while heartbeats come in; and tables
of three sizes, updated as a fleet would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Final

import asyncpg
import uvloop

from bench import stack
from bench.load import Stage, flood, recent_span, target
from bench.load.crowd import CrowdRequests, crowd, make_known
from bench.micro.scratch import database
from bench.micro.status import Grown, Scale, grown
from bench.scenarios import StatusScenario
from bench.status.asking import SETTLE_S, Answers, Questions, ask, asker
from bench.status.found import Found

_SEED: Final = 1
_TABLE: Final = "device_last_status"
# $1 how many in all; the senders are there already, with their tokens
_FILL_DEVICES: Final = """
INSERT INTO devices (device_id, alias, facts_ts)
SELECT gen_random_uuid()::text, 'Store ' || n / 8 || ' - kiosk ' || n % 8 + 1, now()
FROM generate_series(1, $1 - (SELECT count(*) FROM devices)) n
"""
# $1 silent, $2 unity down, of those that do not send ($3 lowest device_no of them). Phases are spread over a minute; a
# silent device has been so for an hour and more.
_FILL_STATUS: Final = """
WITH chosen AS (
    SELECT device_no, row_number() OVER (ORDER BY hashint4(device_no)) AS place FROM devices WHERE device_no >= $3
)
INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type,
    ssid, ip, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, alias, heard_at)
SELECT d.device_no, d.device_id, t.ts, t.ts, 20 + d.device_no % 80, d.device_no % 3 = 0, 26 + d.device_no % 9, 'wifi',
       'Store-' || d.device_no / 8, '192.168.0.0'::inet + d.device_no % 65536, d.device_no % 9000000,
       1000 + d.device_no % 900, '2.1.0', coalesce(c.place NOT BETWEEN $1 + 1 AND $1 + $2, true), '1.0.9', d.alias, t.ts
FROM devices d LEFT JOIN chosen c USING (device_no),
     LATERAL (SELECT now() - CASE WHEN c.place <= $1 THEN interval '1 hour' + c.place * interval '10 s'
                             ELSE d.device_no % 60 * interval '1 s' END AS ts) t
ORDER BY d.device_no
"""
_UPDATES: Final = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = $1"


def run(plan: StatusScenario, told: Callable[[str], None]) -> Found:
    """Fill, ask, grow."""
    with stack.running() as own, asker() as (process, asker_pid):
        told(f"{plan.devices:,} rows")
        found = uvloop.run(_asked(plan, own, process, asker_pid, told))
    growth = []
    for devices, silent, minutes in plan.growth:
        told(f"{minutes} minutes' updates of {devices:,} devices")
        growth.append(uvloop.run(_grown(Scale(devices, silent, minutes))))
    return replace(found, growth=tuple(growth))


async def _grown(scale: Scale) -> Grown:
    async with database() as conn:
        return await grown(conn, scale)


async def _asked(
    plan: StatusScenario, own: stack.Stack, process: ProcessPoolExecutor, asker_pid: int, told: Callable[[str], None]
) -> Found:
    kiosks = crowd(plan.senders, _SEED)
    conn = await own.connect()
    try:
        await make_known(conn, kiosks)
        await _fill(conn, plan)
        # what the senders send now must be newer than what they are said to have sent, and no duplicate of anything
        seconds = plan.requests * plan.every_s + 2 * SETTLE_S
        sends = round(seconds * plan.rate_per_s)
        span = recent_span(max(sends, plan.senders), plan.senders, time.time_ns() // 1000)
        (before,) = await conn.fetch(_UPDATES, _TABLE)
        told(f"{plan.requests} times each list, {plan.rate_per_s:g} heartbeats/s meanwhile")
        questions = Questions(own.port, own.admin_key, own.dsn, plan.requests, plan.every_s)
        asking: list[asyncio.Future[Answers]] = []
        flooded = await flood(
            target(own.url),
            (),
            [Stage("load", plan.rate_per_s, seconds)],
            CrowdRequests(target(own.url), kiosks, span, _SEED),
            connections=min(1_000, plan.senders),
            pid=own.pid,
            beside=asker_pid,
            started=lambda: asking.append(asyncio.get_running_loop().run_in_executor(process, ask, questions)),
        )
        lists, alone = await asking[0]
        await conn.execute("SELECT pg_stat_force_next_flush()")
        (after,) = await conn.fetch(_UPDATES, _TABLE)
        updates, hot = (now - then for now, then in zip(after, before, strict=True))
        result = flooded.run.result
        others = result.extra["others_cores"] or 0.0
        return Found(lists, alone, round(hot / max(1, updates), 4), updates, result.sent - result.ok, others, growth=())
    finally:
        await conn.close(timeout=5)


async def _fill(conn: asyncpg.Connection, plan: StatusScenario) -> None:
    await conn.execute(_FILL_DEVICES, plan.devices)
    await conn.execute(_FILL_STATUS, plan.silent, plan.unity_down, plan.senders + 1)
    await conn.execute(f"VACUUM (ANALYZE) devices, {_TABLE}")
    await conn.execute("CHECKPOINT")
