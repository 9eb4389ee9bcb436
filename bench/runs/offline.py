"""Scenario 3: who is silent, and where does Unity not run? By the last status, and by the history as the seed did."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Final, NamedTuple

import asyncpg
import orjson
import uvloop

from bench import history, stack
from bench.finding import Finding
from bench.fleet import MICROS, make_fleet
from bench.report import Limit, Percentiles, hold, percentiles
from bench.scenarios import OfflineQueryScenario
from nexhb import sql

_SEED: Final = 1
_SEEN_WITHIN: Final = timedelta(hours=24)
_MOST: Final = 10_000
_SPEED_UP: Final = Limit("offline, times faster than legacy", "offline", 53, "at_least")
_SAME: Final = "differences between fast and legacy"


class Compared(NamedTuple):
    """One question asked both ways."""

    question: str
    fast_ms: float
    legacy_ms: float
    devices: int
    different: int

    @property
    def speed_up(self) -> float:
        """How many times faster."""
        return round(self.legacy_ms / self.fast_ms, 1)


class _Loaded(NamedTuple):
    rows: int
    seconds: float


def run(scenario: OfflineQueryScenario) -> Finding:
    """Load the history, ask both ways, ask over HTTP."""
    with stack.running(make_fleet(scenario.devices, _SEED)) as own:
        loaded, compared = uvloop.run(_in_sql(scenario, own))
        over_http = {
            path: _over_http(own, path, scenario.http_requests)
            for path in (f"/v1/devices/offline?minutes={scenario.minutes}", "/v1/devices/unity-down")
        }
    return _finding(scenario, loaded, compared, over_http)


def _finding(
    scenario: OfflineQueryScenario,
    loaded: _Loaded,
    compared: list[Compared],
    over_http: Mapping[str, Percentiles],
) -> Finding:
    offline, _ = compared
    verdicts = [hold(_SPEED_UP, offline.speed_up)]
    verdicts += [hold(Limit(f"{each.question}: {_SAME}", "", 0), each.different) for each in compared]
    figures = {"history": f"{loaded.rows:,} rows of {scenario.devices} devices, loaded in {loaded.seconds:.0f} s"}
    for each in compared:
        figures[each.question] = (
            f"{each.devices} devices; fast {each.fast_ms:.3f} ms, legacy {each.legacy_ms:,.0f} ms: "
            f"{each.speed_up:,.0f} times"
        )
    for path, spread in over_http.items():
        verdicts.append(hold(Limit(f"p95 of {path.partition('?')[0]} below 5 ms", "p95_ms", 5), spread.p95_ms))
        figures[f"GET {path}"] = f"p50 {spread.p50_ms} ms, p95 {spread.p95_ms} ms, p99 {spread.p99_ms} ms"
    details = {
        "rows": loaded.rows,
        "questions": [{**each._asdict(), "speed_up": each.speed_up} for each in compared],
        "http": {path: {"p50_ms": s.p50_ms, "p95_ms": s.p95_ms, "p99_ms": s.p99_ms} for path, s in over_http.items()},
    }
    return Finding(scenario.name, scenario.title, tuple(verdicts), figures, details)


# ── the history ──────────────────────────────────────────────────────────────────────────────────────────


async def _in_sql(scenario: OfflineQueryScenario, own: stack.Stack) -> tuple[_Loaded, list[Compared]]:
    conn = await own.connect()
    try:
        began = time.monotonic()
        rows = await _load(conn, scenario)
        loaded = _Loaded(rows, time.monotonic() - began)
        now = datetime.now(UTC)
        cutoff = now - timedelta(minutes=scenario.minutes)
        return loaded, [
            await _compare(conn, scenario, "offline", cutoff),
            await _compare(conn, scenario, "unity_down", now - _SEEN_WITHIN),
        ]
    finally:
        await conn.close(timeout=5)


async def _load(conn: asyncpg.Connection, scenario: OfflineQueryScenario) -> int:
    """A day of every device; that of the silent ones ends some time before now."""
    fleet = make_fleet(scenario.devices, _SEED)
    rng = random.Random(f"nexhb offline:{_SEED}")
    silent = set(rng.sample(range(scenario.devices), round(scenario.devices * scenario.offline_share)))
    away_us = [rng.randrange(15 * 60, 6 * 3600) * MICROS if d in silent else 0 for d in range(scenario.devices)]
    writer = await history.Writer.of(conn, fleet)
    rows = 0
    for minute in _shifted(scenario, away_us):
        rows += await writer.write(writer.heartbeats(minute))
    await history.fill_last_status(conn)
    await conn.execute("VACUUM ANALYZE device_heartbeats, device_last_status, devices, heartbeat_labels")
    return rows


def _shifted(scenario: OfflineQueryScenario, away_us: list[int]) -> Iterator[list[history.Beat]]:
    now_us = time.time_ns() // 1000
    for minute in history.minutes_of(scenario.devices, scenario.beats, scenario.interval_s, now_us):
        yield [beat._replace(at_us=beat.at_us - away_us[beat.device]) for beat in minute]


# ── both ways ────────────────────────────────────────────────────────────────────────────────────────────


async def _compare(
    conn: asyncpg.Connection, scenario: OfflineQueryScenario, question: str, moment: datetime
) -> Compared:
    """Ask both ways in turn, on one connection."""
    fast_query, legacy_query = sql.queries("reads")[question], sql.legacy()[question]
    fast_s, legacy_s = [], []
    for _ in range(scenario.legacy_rounds):
        for _ in range(scenario.fast_per_round):
            took_s, fast = await _timed(conn, fast_query, moment, _MOST)
            fast_s.append(took_s)
        took_s, legacy = await _timed(conn, legacy_query, moment)
        legacy_s.append(took_s)
    different = {row["device_id"]: row["last_ts"] for row in fast}.items() ^ {
        row["device_id"]: row["last_ts"] for row in legacy
    }.items()
    return Compared(question, median(fast_s) * 1e3, median(legacy_s) * 1e3, len(fast), len(different))


async def _timed(conn: asyncpg.Connection, query: str, *args: object) -> tuple[float, list[asyncpg.Record]]:
    began = time.perf_counter()
    rows: list[asyncpg.Record] = await conn.fetch(query, *args)
    return time.perf_counter() - began, rows


def _over_http(own: stack.Stack, path: str, requests: int) -> Percentiles:
    """One request after the other on one connection, as a dashboard asks."""
    connection = http.client.HTTPConnection("127.0.0.1", own.port, timeout=30)
    headers, took = {"x-admin": own.admin_key}, []
    try:
        for _ in range(requests):
            began = time.perf_counter()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            found = orjson.loads(answer.read())
            took.append(time.perf_counter() - began)
            if answer.status != 200 or found["count"] == 0:
                raise stack.StackError(f"GET {path} answered {answer.status}: {found}")
    finally:
        connection.close()
    return percentiles(took)
