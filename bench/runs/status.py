"""Request both lists of a last status of a million devices over HTTP while heartbeats arrive."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Final, NamedTuple

import aiohttp
import orjson
import uvloop

from bench import stack
from bench.finding import Finding, figure, markdown
from bench.fleet import make_accounts
from bench.load import Keys, Spliced, due_times, stream, target
from bench.report import Percentiles, Result, at_least, at_most, percentiles
from bench.runs import Plan, Say
from bench.runs.curve import add_accounts
from bench.trial import SEED
from nexhb.http.operator_api.fleet import MAX_LIST
from nexhb.postgres import sql

PATHS: Final = ("/v1/devices/offline", "/v1/devices/unity-down")
_ALONE: Final = "the first list's rows by asyncpg alone"
_SETTLE_S: Final = 1.0  # before the first request
_SILENT_FOR: Final = timedelta(minutes=10)  # heartbeat.offline_after_seconds
# $1: number of devices in total; the devices that send are in the table already, with their tokens
_FILL_DEVICES: Final = """
INSERT INTO devices (device_id, alias, facts_ts)
SELECT gen_random_uuid()::text, 'Store ' || n / 8 || ' - kiosk ' || n % 8 + 1, now()
FROM generate_series(1, $1 - (SELECT count(*) FROM devices)) n
"""
# $1: number of silent devices; $2: number of devices with Unity down; $3: the lowest device_no of the devices that do
# not send, of which both kinds are chosen. Phases are spread over a minute; a silent device was last seen at least an
# hour ago.
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


class Read(NamedTuple):
    """The figures of a list requested over HTTP, or of the same rows fetched by asyncpg alone."""

    path: str
    devices: int
    latency: Percentiles


@dataclass(frozen=True)
class Status(Plan):
    """A last status of a million rows, requested over HTTP under a load."""

    QUICK: ClassVar = {"requests": 60}

    name: str = "status"
    title: str = "device_last_status of a million devices, requested over HTTP while heartbeats come in"
    devices: int = 1_000_000
    silent: int = 1_000
    unity_down: int = 300
    # devices that send during the requests, and their heartbeats per second
    senders: int = 20_000
    rate_per_s: float = 333
    # requests of each list, one every `every_s`
    requests: int = 200
    every_s: float = 0.05

    def run(self, say: Say) -> Finding:
        """Fill the table, request the lists; return the finding."""
        with stack.running() as own:
            say(f"{self.devices:,} rows")
            reads, result = uvloop.run(self._measure(own, say))
        silent, down, _ = reads
        verdicts = (
            *(at_most(f"{each.path}: p95 below 10 ms", 10, each.latency.p95_ms) for each in (silent, down)),
            at_most("offline devices that are not in the list", 0, abs(self.silent - silent.devices)),
            at_least("devices listed with Unity down", self.unity_down, down.devices),
            at_most("heartbeats not acknowledged meanwhile", 0, result.sent - result.ok),
        )
        page, cores = self._page(reads), result.others_cores or 0.0
        return Finding(self.name, self.title, verdicts, {}, {"reads": reads}, (cores,), page)

    async def _measure(self, own: stack.Stack, say: Say) -> tuple[tuple[Read, ...], Result]:
        """Return the figures of the reads, and the load meanwhile."""
        accounts = make_accounts(self.senders, SEED)
        await add_accounts(own, accounts)
        async with own.connected() as conn:
            await conn.execute(_FILL_DEVICES, self.devices)
            await conn.execute(_FILL_STATUS, self.silent, self.unity_down, self.senders + 1)
            await conn.execute("VACUUM (ANALYZE) devices, device_last_status")
            await conn.execute("CHECKPOINT")
        say(f"{self.requests} requests of each list, {self.rate_per_s:g} heartbeats/s meanwhile")
        lasts_s, to = self.requests * self.every_s + 2 * _SETTLE_S, target(own.url)
        due_us = due_times((self.rate_per_s, lasts_s))
        # the heartbeats sent now must be newer than the last status of their devices, and no duplicates
        span = Keys(max(len(due_us), self.senders), self.senders).holding(len(due_us))
        requests = Spliced(to, accounts, span)
        # The reads are made by a thread of their own: in the generator's event loop a response would wait until the
        # generator has handled a heartbeat, and this wait would count as the daemon's time.
        reading = asyncio.create_task(asyncio.to_thread(uvloop.run, _read(own, self.requests, self.every_s)))
        sent = await stream(to, requests, due_us, duration_s=lasts_s, connections=1_000, pids=(own.pid,))
        return await reading, sent.result

    def _page(self, reads: tuple[Read, ...]) -> tuple[str, ...]:
        """Return the section of docs/performance.md."""
        intro = (
            "## The last status of a million devices\n\n"
            f"`GET {PATHS[0]}` and `{PATHS[1]}` are requested {self.requests} times each over HTTP, from a "
            f"device_last_status of {self.devices:,} rows, {self.silent:,} of them silent, while {self.rate_per_s:g} "
            f"heartbeats a second come in from {self.senders:,} other devices. After each request of both lists, "
            "asyncpg fetches the first list's rows from the same PostgreSQL and discards them."
        )
        rows = [(path, *map(figure, (devices, of.p50_ms, of.p95_ms, of.p99_ms))) for path, devices, of in reads]
        return intro, markdown(("", "devices", "p50 ms", "p95 ms", "p99 ms"), rows)


async def _read(own: stack.Stack, requests: int, every_s: float) -> tuple[Read, ...]:
    """In turn request both lists and fetch the rows of the first one by asyncpg; return the figures of each."""
    await asyncio.sleep(_SETTLE_S)
    took: dict[str, list[float]] = {path: [] for path in (*PATHS, _ALONE)}
    bodies: dict[str, bytes] = {}
    async with (
        aiohttp.ClientSession(own.url, headers={"x-admin": own.admin_key}, raise_for_status=True) as session,
        own.connected() as conn,
    ):
        began = time.monotonic()
        for number in range(requests):
            for at, path in enumerate(took):
                await asyncio.sleep(max(0.0, began + (number + at / len(took)) * every_s - time.monotonic()))
                start = time.perf_counter()
                if path == _ALONE:
                    silent_since = datetime.now(UTC) - _SILENT_FOR
                    await conn.fetch(sql.queries("reads")["offline_all"], silent_since, "{}", MAX_LIST)
                else:
                    async with session.get(path) as response:
                        bodies[path] = await response.read()
                took[path].append(time.perf_counter() - start)
    counts = {path: orjson.loads(body)["count"] for path, body in bodies.items()}
    counts[_ALONE] = counts[PATHS[0]]
    return tuple(Read(path, counts[path], percentiles(took[path])) for path in took)
