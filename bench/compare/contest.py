"""The run: one daemon, one PostgreSQL, one generator; servers take turns."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from statistics import mean, median
from typing import Final, NamedTuple

import asyncpg

from bench import stack
from bench.compare import found as f
from bench.cost import PerHeartbeat, per_heartbeat
from bench.fleet import Device, make_fleet
from bench.floors import Copy, Orientation, orientation
from bench.load import Keys, LoadRun, Span, Stage, Target, closed_loop, flood, recent_span, target
from bench.load.batches import QUEUE, Batches, Form, Queue, queue
from bench.peers import fastapi_insert, nexmdm, process
from bench.peers.process import Server
from bench.report import ALL_ACKNOWLEDGED, Limit, Percentiles, latencies_due, percentiles
from bench.runs import steady
from bench.scenarios import CompareScenario
from bench.trial import Trial, examine, together

_SEED: Final = 1
_CLEAN: Final = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
# The generator's own connections carry many devices' heartbeats each, and one device's many; 64 connections with 500
# heartbeats each are more than the queue holds by default. Neither bound costs anything where it is not met.
_SETTINGS: Final = {
    "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000",
    "NEXHB_INGEST__DEVICE_BURST": "1000000",
    "NEXHB_INGEST__QUEUE_ITEMS": "40000",
    "NEXHB_INGEST__QUEUE_BYTES": "67108864",
}
# requests/s that a server certainly does not reach: keys and bodies are made for so many
_BOUND: Final = 45_000
_PEER_BOUND: Final = 6_000
_HASHED_BOUND: Final = 50
_BODIES_BOUND: Final = 240
# transactions of the larger kind until the table is emptied
_COPIES: Final = 10


@dataclass
class _Lane:
    """A server in the contest, and what it has done."""

    name: str
    server: Server
    fleet: Sequence[Device]
    keys: Keys
    bound: int
    connections: int
    # who runs the PostgreSQL of a peer
    beside: int | None = None
    runs: list[LoadRun] = field(default_factory=list)
    rounds: list[LoadRun] = field(default_factory=list)

    async def run(self, seconds: float, warm_s: float, connections: int | None = None) -> LoadRun:
        """Load it, as fast as it goes."""
        done = await closed_loop(
            target(self.server.url),
            self.fleet,
            connections=connections or self.connections,
            duration_s=seconds,
            warm_s=warm_s,
            span=self.keys.take(round(self.bound * seconds)),
            pid=self.server.pid,
            beside=self.beside,
        )
        if self.name != f.NEXHB and done.result.ok < done.result.sent:
            # nexhb's own refusals are verdicts; a peer that does not work is no peer
            raise stack.StackError(f"{self.name}: {done.result.statuses}, {done.result.failures}")
        self.runs.append(done)
        return done

    async def round(self, seconds: float, warm_s: float) -> None:
        """One that counts."""
        self.rounds.append(await self.run(seconds, warm_s))

    @property
    def found(self) -> f.Rounds:
        """What came of the rounds."""
        return _rounds([each.result.rate_per_s for each in self.rounds], self.rounds, 1, self.connections)


def _rounds(per_s: Sequence[float], runs: Sequence[LoadRun], heartbeats: int, connections: int) -> f.Rounds:
    cpu = PerHeartbeat(
        *(
            round(median(each.result.extra[f"window_{whose}_cpu_us"] or 0.0 for each in runs) / heartbeats, 1)
            for whose in ("daemon", "postgres")
        )
    )
    p99s = [each.result.p99_ms for each in runs if each.result.p99_ms is not None]
    return f.Rounds(tuple(per_s), cpu, connections, median(p99s) if p99s else None)


class Outcome(NamedTuple):
    """What was measured, and what the database says of every row that nexhb was sent, in both parts."""

    found: f.Found
    steady: Trial
    rounds: Trial


async def run(plan: CompareScenario) -> Outcome:
    """All of it, in this order: the fleet on its schedule; tries; rounds; batches; two rates; every row."""
    fleet = make_fleet(plan.devices, _SEED)
    with stack.running(fleet) as own:
        before = await _least(own)
        calm = await steady.sent(plan.steady, own, heard_before=True)
        after = await _least(own)
    least = Orientation(*(round(mean(each), 3) for each in zip(before, after, strict=True)))
    with stack.running(fleet, settings=_SETTINGS) as own, process.running("bare_aiohttp") as bare:
        return await _Contest(plan, fleet, own, bare).run(calm, least)


async def _least(own: stack.Stack) -> Orientation:
    async with _connected(own) as conn:
        return await orientation(conn)


@contextlib.asynccontextmanager
async def _connected(own: stack.Stack, database: str | None = None) -> AsyncIterator[asyncpg.Connection]:
    conn = await own.connect(database)
    try:
        yield conn
    finally:
        await conn.close(timeout=5)


@dataclass(frozen=True, slots=True)
class _Buckets:
    """The stretches of one recent span, oldest first: each part of the contest is newer than the last."""

    singles: Keys
    queues: Span
    paces: Span

    @classmethod
    def of(cls, plan: CompareScenario, now_us: int) -> _Buckets:
        """As many as the plan may use."""
        # a round more for what rounding up takes
        single_s = len(plan.connections) * plan.trial_s + (plan.rounds + 1) * plan.round_s
        tries, forms = len(plan.batch_connections), 2
        bodies = round(_BODIES_BOUND * plan.batch_s) * (tries + forms * plan.rounds)
        singles = round(_BOUND * single_s / plan.devices) + 1
        queues = (bodies // plan.devices + 1) * QUEUE
        paces = round(sum(plan.rates) * plan.rate_s / plan.devices) + 2
        span = recent_span((singles + queues + paces) * plan.devices, plan.devices, now_us)
        keys = Keys(span, plan.devices)
        return cls(Keys(keys.buckets(singles), plan.devices), keys.buckets(queues), keys.buckets(paces))


class _Batched(NamedTuple):
    """POST /v1/heartbeats and COPY; see Found."""

    tries: dict[int, float]
    forms: dict[str, f.Rounds]
    copies: dict[int, tuple[float, ...]]
    packed_copy: tuple[float, ...]


class _Contest:
    """The servers that run side by side, and what each has done so far."""

    def __init__(self, plan: CompareScenario, fleet: Sequence[Device], own: stack.Stack, bare: Server) -> None:
        self._plan, self._fleet, self._own = plan, fleet, own
        now_us = time.time_ns() // 1000
        self._buckets = _Buckets.of(plan, now_us)
        # what keeps nothing, and each peer's database, have keys of their own
        any_span = recent_span(8_000 * plan.devices, plan.devices, now_us)
        self._peer_span, self._hashed_span = any_span.parts(2)
        self._queue_numbers = count()
        server = Server(own.url, own.pid)
        self._nexhb = _Lane(f.NEXHB, server, fleet, self._buckets.singles, _BOUND, plan.connections[0])
        self._bare = _Lane(f.BARE, bare, fleet, Keys(any_span, plan.devices), 3 * _BOUND, plan.connections[0])
        # of nexhb alone, a heartbeat a line
        self._batch_runs: list[LoadRun] = []

    async def run(self, calm: Trial, least: Orientation) -> Outcome:
        """Every part."""
        plan = self._plan
        sides = await self._sides()
        async with contextlib.AsyncExitStack() as peers:
            await self._prepare_peers()
            pools, fastapi = await self._best_fastapi(peers)
            lanes = [self._bare, self._nexhb, fastapi, *self._nexmdm(peers)]
            for _ in range(plan.rounds):
                for lane in lanes:
                    seconds = {f.BARE: plan.round_s, f.NEXHB: plan.round_s, f.NEXMDM_BCRYPT: plan.hashed_s}
                    await lane.round(seconds.get(lane.name, plan.peer_s), plan.warm_s)
            kept = await self._rows_of_peers()
        batched = await self._batches()
        paces, flooded = await self._paces()
        every = [*self._nexhb.runs, *self._batch_runs, flooded]
        rounds = await examine(self._own, self._fleet, together(every), _CLEAN)
        peer_runs = [*self._fastapi_runs, *(each for lane in lanes[3:] for each in lane.runs)]
        cores = [each.result.extra.get("others_cores") for each in (*every, *self._bare.runs, *peer_runs)]
        # counted by request
        batch_us = median(each.result.generator_cpu_us_per_send / QUEUE for each in self._batch_runs)
        found = f.Found(
            sides=sides,
            singles={lane.name: lane.found for lane in lanes},
            pools=pools,
            pool=max(pools, key=lambda tried: pools[tried])[0],
            batch_tries=batched.tries,
            batches=batched.forms,
            copies=batched.copies,
            packed_copy=batched.packed_copy,
            paces=paces,
            steady=Percentiles(calm.result.p50_ms, calm.result.p95_ms, calm.result.p99_ms, calm.result.max_ms),
            least=least,
            acknowledged=sum(each.result.ok for each in peer_runs),
            kept=kept,
            generator_us=median(each.result.generator_cpu_us_per_send for each in self._bare.rounds),
            generator_batch_us=round(batch_us, 2),
            others_cores=tuple(each for each in cores if each is not None),
            load_average=round(os.getloadavg()[2], 2),
        )
        return Outcome(found, calm, rounds)

    # ── single heartbeats ────────────────────────────────────────────────────────────────────────────────

    async def _sides(self) -> dict[int, f.Side]:
        """nexhb and the bare handler at each number of connections; each goes on with its best."""
        sides = {}
        for connections in self._plan.connections:
            both = [
                await lane.run(self._plan.trial_s, self._plan.warm_s / 2, connections)
                for lane in (self._bare, self._nexhb)
            ]
            sides[connections] = f.Side(*(each.result.rate_per_s for each in both))
        self._bare.connections = max(sides, key=lambda each: sides[each].bare)
        self._nexhb.connections = max(sides, key=lambda each: sides[each].nexhb)
        return sides

    async def _prepare_peers(self) -> None:
        async with _connected(self._own) as conn:
            for name in ("fastapi", "nexmdm"):
                await conn.execute(f"CREATE DATABASE {name}")
        async with _connected(self._own, "fastapi") as conn:
            await fastapi_insert.prepare(conn, self._fleet)
        async with _connected(self._own, "nexmdm") as conn:
            first = datetime.now(UTC) - timedelta(days=2)
            await nexmdm.prepare(conn, self._fleet, self._plan.hashed_devices, first)

    async def _best_fastapi(self, peers: contextlib.AsyncExitStack) -> tuple[dict[tuple[int, int], float], _Lane]:
        """Try pools at the middle number of connections, then the best pool at the others; the best of all, running."""
        plan, keys = self._plan, Keys(self._peer_span, self._plan.devices)
        middle = plan.peer_connections[len(plan.peer_connections) // 2]
        tried: dict[tuple[int, int], float] = {}
        self._fastapi_runs: list[LoadRun] = []

        def lane(server: Server, connections: int) -> _Lane:
            return _Lane(
                f.FASTAPI, server, self._fleet, keys, _PEER_BOUND, connections, self._own.pid, self._fastapi_runs
            )

        async def attempt(server: Server, pool: int, connections: int) -> None:
            done = await lane(server, connections).run(plan.trial_s, plan.warm_s / 2)
            tried[pool, connections] = done.result.rate_per_s

        dsn = self._own.dsn_of("fastapi")
        for pool in plan.pools:
            with process.running("fastapi_insert", "--dsn", dsn, "--pool", str(pool)) as server:
                await attempt(server, pool, middle)
        best = max(tried, key=lambda each: tried[each])[0]
        server = peers.enter_context(process.running("fastapi_insert", "--dsn", dsn, "--pool", str(best)))
        for connections in plan.peer_connections:
            if connections != middle:
                await attempt(server, best, connections)
        return tried, lane(server, max(tried, key=lambda each: tried[each])[1])

    def _nexmdm(self, peers: contextlib.AsyncExitStack) -> list[_Lane]:
        """Its three variants, running: without bcrypt, that on threads, and as it is."""
        plan, dsn, beside = self._plan, self._own.dsn_of("nexmdm"), self._own.pid
        keys, few = Keys(self._peer_span, plan.devices), self._fleet[: plan.hashed_devices]
        connections = plan.peer_connections[len(plan.peer_connections) // 2]

        def server(*words: str) -> Server:
            return peers.enter_context(process.running("nexmdm", "--dsn", dsn, *words))

        return [
            _Lane(f.NEXMDM, server("--no-bcrypt"), self._fleet, keys, _PEER_BOUND, connections, beside),
            _Lane(
                f.NEXMDM_THREADS,
                server("--no-bcrypt", "--threads"),
                self._fleet,
                keys,
                _PEER_BOUND,
                connections,
                beside,
            ),
            _Lane(
                f.NEXMDM_BCRYPT,
                server(),
                few,
                Keys(self._hashed_span, len(few)),
                _HASHED_BOUND,
                plan.hashed_connections,
                beside,
            ),
        ]

    async def _rows_of_peers(self) -> int:
        total = 0
        for database, table in (("fastapi", "heartbeats"), ("nexmdm", "device_heartbeats")):
            async with _connected(self._own, database) as conn:
                total += await conn.fetchval(f"SELECT count(*) FROM {table}")
        return total

    # ── POST /v1/heartbeats ──────────────────────────────────────────────────────────────────────────────

    async def _batches(self) -> _Batched:
        """COPY, arrays and NDJSON in turn, the latter at the number of connections that is best for arrays."""
        plan = self._plan
        tries = {}
        for connections in plan.batch_connections:
            done = await self._batch("array", connections, plan.trial_s)
            tries[connections] = done.result.rate_per_s * QUEUE
        best = max(tries, key=lambda each: tries[each])
        forms: dict[str, Form] = {f.ARRAY: "array", f.NDJSON: "ndjson"}
        runs: dict[str, list[LoadRun]] = {name: [] for name in forms}
        copies: dict[int, list[float]] = {rows: [] for rows in plan.copy_rows}
        packed: list[float] = []
        async with _connected(self._own) as conn, _connected(self._own) as plain_conn:
            queues = _COPIES * max(plan.copy_rows) // QUEUE
            copy = await Copy.of(conn, self._fleet, [self._queue(number) for number in range(queues)])
            plain = copy.plainly(plain_conn)
            for _ in range(plan.rounds):
                for rows, per_s in copies.items():
                    per_s.append(await plain.rate(rows, plan.batch_s / 2))
                packed.append(await copy.rate(max(plan.copy_rows), plan.batch_s / 2))
                for name, form in forms.items():
                    runs[name].append(await self._batch(form, best, plan.batch_s))
            await copy.drop()
        found = {
            name: _rounds([each.result.rate_per_s * QUEUE for each in done], done, QUEUE, best)
            for name, done in runs.items()
        }
        return _Batched(tries, found, {rows: tuple(per_s) for rows, per_s in copies.items()}, tuple(packed))

    def _queue(self, number: int) -> Queue:
        return queue(number, self._fleet, self._buckets.queues)

    async def _batch(self, form: Form, connections: int, seconds: float) -> LoadRun:
        """Load nexhb with bodies made beforehand; the result counts requests, what is kept of it heartbeats."""
        to: Target = target(self._own.url)
        numbers = islice(self._queue_numbers, round(_BODIES_BOUND * seconds))
        requests = Batches(to, self._fleet, [self._queue(number) for number in numbers], form)
        done = await closed_loop(
            requests.to,
            self._fleet,
            connections=connections,
            duration_s=seconds,
            warm_s=self._plan.warm_s / 2,
            requests=requests,
            pid=self._own.pid,
        )
        counts = {
            name: getattr(done.result, name) * QUEUE for name in ("sent", "ok", "refused", "failed", "deduplicated")
        }
        self._batch_runs.append(
            replace(done, result=replace(done.result, **counts), sends=requests.heartbeats(done.sends))
        )
        return done

    # ── what a heartbeat costs at two rates ──────────────────────────────────────────────────────────────

    async def _paces(self) -> tuple[tuple[f.Pace, f.Pace], LoadRun]:
        plan = self._plan
        stages = [Stage(f"{rate:,.0f}/s", rate, plan.rate_s) for rate in plan.rates]
        flooded = await flood(
            target(self._own.url),
            self._fleet,
            stages,
            self._buckets.paces,
            connections=plan.rate_connections,
            pid=self._own.pid,
        )
        record = flooded.record
        paces = []
        for number, (stage, cost) in enumerate(zip(stages, flooded.costs, strict=True)):
            begins_s, ends_s = number * plan.rate_s, (number + 1) * plan.rate_s
            sends = sum(begins_s <= due / 1e6 < ends_s for due in record.due_us)
            latency = percentiles(latencies_due(record.due_us, record.took_s, begins_s, ends_s))
            paces.append(f.Pace(stage.rate_per_s, sends / plan.rate_s, per_heartbeat(cost, sends), latency))
        slow, fast = paces
        return (slow, fast), flooded.run
