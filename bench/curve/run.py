"""The run: for each rate a fresh daemon and database which know a fleet of its size."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

import asyncpg
import uvloop

from bench import stack
from bench.check import Named
from bench.cost import Cost, per_heartbeat
from bench.curve.found import Curve, Memory, Point
from bench.fleet import make_fleet
from bench.load import Keys, LoadRun, Stage, closed_loop, flood, recent_span, target
from bench.load.crowd import CrowdRequests, Kiosk, crowd, make_known
from bench.load.pool import RequestPool
from bench.report import ALL_ACKNOWLEDGED, Limit, Percentiles, latencies_due, percentiles
from bench.scenarios import CurveScenario
from bench.scrape import Scrape
from bench.trial import Trial, examine, together
from nexhb.config import Ingest

_SEED: Final = 1
_CLEAN: Final = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
# The generator's connections carry many devices' heartbeats each, at the ceiling one device's many a minute.
_SETTINGS: Final = {"NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000", "NEXHB_INGEST__DEVICE_BURST": "1000000"}
# keys of the ceiling are made for so many heartbeats/s
_BOUND: Final = 40_000
# the allocator and the tables of tokens are at rest
_SETTLE_S: Final = 1.0
_HISTORY_BYTES: Final = """
SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint FROM pg_inherits
WHERE inhparent = 'device_heartbeats'::regclass
"""
_SIZES: Final = f"""
SELECT ({_HISTORY_BYTES}) AS history, pg_total_relation_size('device_last_status')::bigint AS status,
       pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS wal
"""


_T = TypeVar("_T")


class Outcome(NamedTuple):
    """The curve, and what the database says of every row, point by point."""

    curve: Curve
    trials: tuple[Trial, ...]


class _Look(NamedTuple):
    """What daemon and database say at one moment."""

    metrics: Scrape
    history: int
    status: int
    wal: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A window: what was seen at its beginning and its end, and how many heartbeats were acknowledged in it."""

    empty: _Look
    before: _Look
    after: _Look
    acknowledged: int
    rows: int


def run(plan: CurveScenario, idle: dict[str, str], told: Callable[[str], None]) -> Outcome:
    """Every point, from the smallest fleet to the ceiling; `told` hears which one begins."""
    paces = []
    for devices in plan.fleets:
        told(f"{devices:,} devices")
        paces.append(_at_rate(plan, devices))
    told("the ceiling")
    ceiling, trial = _ceiling(plan)
    curve = Curve(tuple(point for point, _ in paces), ceiling, idle)
    return Outcome(curve, (*(trial for _, trial in paces), trial))


# ── a fleet at its rate ──────────────────────────────────────────────────────────────────────────────────


def _at_rate(plan: CurveScenario, devices: int) -> tuple[Point, Trial]:
    kiosks = crowd(devices, _SEED)
    with stack.running() as own:
        uvloop.run(_connected(own, lambda conn: make_known(conn, kiosks)))
        own.stop()
        start_s = own.start()
        time.sleep(_SETTLE_S)
        return uvloop.run(_paced(plan, own, kiosks, start_s))


async def _paced(
    plan: CurveScenario, own: stack.Stack, kiosks: tuple[Kiosk, ...], start_s: float
) -> tuple[Point, Trial]:
    rate = len(kiosks) / plan.interval_s
    stages = [Stage("settle", rate, plan.settle_s), Stage("window", rate, plan.window_s)]
    sends = sum(round(stage.rate_per_s * stage.duration_s) for stage in stages)
    # whoever sends in the window is to be known from before, as a fleet's devices are
    heard = kiosks if plan.all_heard else kiosks[: min(sends, len(kiosks))]
    buckets = Keys(recent_span(2 * len(heard), len(heard), time.time_ns() // 1000), len(heard))
    known_mb, empty = own.memory().rss_mb, await _look(own)
    began = time.monotonic()
    first = await _first(plan, own, CrowdRequests(target(own.url), heard, buckets.buckets(1), _SEED))
    first_per_s = round(first.result.ok / (time.monotonic() - began), 1)
    heard_mb = own.memory().rss_mb
    looking: list[asyncio.Task[_Look]] = []
    flooded = await flood(
        target(own.url),
        (),
        stages,
        CrowdRequests(target(own.url), heard, buckets.buckets(1), _SEED),
        connections=min(plan.connections, len(kiosks)),
        pid=own.pid,
        started=lambda: looking.append(asyncio.create_task(_look(own, plan.settle_s))),
    )
    before, after = await looking[0], await _look(own)
    memory = Memory(known_mb, heard_mb, own.memory().rss_mb)
    trial = await _examined(own, heard, first, flooded.run)
    record = flooded.record
    window = (plan.settle_s, plan.settle_s + plan.window_s)
    sent = sum(window[0] <= due / 1e6 < window[1] for due in record.due_us)
    return _point(
        _Seen(empty, before, after, sent, trial.check.lines[0].found),
        flooded.costs[-1],
        name=f"{rate:,.0f}/s",
        devices=len(kiosks),
        heard=len(heard),
        due_per_s=rate,
        sent_per_s=round(sent / plan.window_s, 1),
        latency=percentiles(latencies_due(record.due_us, record.took_s, *window)),
        memory=memory,
        start_s=round(start_s, 2),
        first_per_s=first_per_s,
    ), trial


async def _first(plan: CurveScenario, own: stack.Stack, requests: CrowdRequests) -> LoadRun:
    """One heartbeat of each, as fast as it goes."""
    return await closed_loop(
        target(own.url), (), connections=plan.first_connections, duration_s=600, warm_s=0, requests=requests,
        pid=own.pid,
    )  # fmt: skip


# ── the ceiling ──────────────────────────────────────────────────────────────────────────────────────────


def _ceiling(plan: CurveScenario) -> tuple[Point, Trial]:
    fleet = make_fleet(plan.ceiling_devices, _SEED)
    with stack.running(fleet, settings=_SETTINGS) as own:
        own.stop()
        start_s = own.start()
        time.sleep(_SETTLE_S)
        return uvloop.run(_as_it_goes(plan, own, start_s))


async def _as_it_goes(plan: CurveScenario, own: stack.Stack, start_s: float) -> tuple[Point, Trial]:
    fleet, to = make_fleet(plan.ceiling_devices, _SEED), target(own.url)
    lasts_s = plan.settle_s + plan.window_s
    requests = RequestPool(to, fleet, recent_span(round(_BOUND * lasts_s), len(fleet), time.time_ns() // 1000))
    known_mb, empty = own.memory().rss_mb, await _look(own)
    looking = asyncio.create_task(_look(own, plan.settle_s))
    done = await closed_loop(
        to, fleet, connections=plan.ceiling_connections, duration_s=lasts_s, warm_s=plan.settle_s, requests=requests,
        pid=own.pid,
    )  # fmt: skip
    before, after = await looking, await _look(own)
    end_mb = own.memory().rss_mb
    trial = await _examined(own, fleet, done)
    result, extra = done.result, {name: value or 0 for name, value in done.result.extra.items()}
    window = Cost(result.generator_cpu_s, result.server_cpu_s, result.server_tree_cpu_s, at_s=extra["window_s"])
    point = _point(
        _Seen(empty, before, after, int(extra["window_sends"]), trial.check.lines[0].found),
        window,
        name="as fast as it goes",
        devices=len(fleet),
        heard=len(fleet),
        due_per_s=None,
        sent_per_s=result.rate_per_s,
        latency=Percentiles(result.p50_ms, result.p95_ms, result.p99_ms, result.max_ms),
        memory=Memory(known_mb, end_mb, end_mb),
        start_s=round(start_s, 2),
        first_per_s=None,
    )
    return replace(point, others_cores=extra["others_cores"]), trial


# ── what is looked at ────────────────────────────────────────────────────────────────────────────────────


async def _look(own: stack.Stack, after_s: float = 0.0) -> _Look:
    """Beside the load: a scrape, and the sizes."""
    await asyncio.sleep(after_s)
    metrics = await asyncio.to_thread(own.metrics)

    ((history, status, wal),) = await _connected(own, lambda conn: conn.fetch(_SIZES))
    return _Look(metrics, history, status, int(wal))


def _point(
    seen: _Seen,
    cost: Cost,
    *,
    name: str,
    devices: int,
    heard: int,
    due_per_s: float | None,
    sent_per_s: float,
    latency: Percentiles,
    memory: Memory,
    start_s: float,
    first_per_s: float | None,
) -> Point:
    """What was seen, as figures of a heartbeat, of a device, of a second."""
    gained, after, window_s = seen.after.metrics.since(seen.before.metrics), seen.after, max(1e-9, cost.at_s)
    written = gained.value("hb_writes_total") or 1.0
    return Point(
        name=name,
        devices=devices,
        heard=heard,
        due_per_s=due_per_s,
        sent_per_s=sent_per_s,
        latency=latency,
        cpu=per_heartbeat(cost, seen.acknowledged),
        daemon_cores=round((cost.server_s or 0.0) / window_s, 3),
        generator_cores=round(cost.generator_s / window_s, 3),
        memory=memory,
        start_s=start_s,
        row_bytes=round((after.history - seen.empty.history) / max(1, seen.rows), 1),
        rows=seen.rows,
        wal_bytes=round((after.wal - seen.before.wal) / written, 1),
        status_bytes=round(after.status / heard, 1),
        batch_mean=_rounded(gained.mean("nexhb_batch_heartbeats")),
        batch_max=Ingest().batch_max,
        queue_wait_ms=_ms(gained.quantile("nexhb_queue_wait_seconds", 0.99)),
        loop_lag_ms=_ms(gained.quantile("nexhb_loop_lag_seconds", 0.99)),
        first_per_s=first_per_s,
        others_cores=cost.others_cores or 0.0,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


async def _examined(own: stack.Stack, fleet: Sequence[Named], *runs: LoadRun) -> Trial:
    return await examine(own, fleet, together(runs), _CLEAN)


async def _connected(own: stack.Stack, work: Callable[[asyncpg.Connection], Awaitable[_T]]) -> _T:
    conn = await own.connect()
    try:
        return await work(conn)
    finally:
        await conn.close(timeout=5)
