"""Compare nexhb with floors and peers in one run: one daemon, one PostgreSQL, one generator; the servers take turns."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from statistics import median
from typing import ClassVar, Final

import uvloop

from bench import stack
from bench.finding import LOAD_HEAD, Finding, figure, load_cells, markdown, spread, worst
from bench.fleet import Device, make_fleet
from bench.floors import Floors, copy_rate, floors_of
from bench.load import RATE_BOUND, Keys, LoadRun, Spliced, Target, stream, target
from bench.load.requests import QUEUE, Batches, Form, Requests
from bench.peers import process
from bench.peers.process import Server
from bench.report import NOTHING_DEDUPLICATED, Percentiles, Result, Verdict, at_least, at_most, counts_of
from bench.runs import Plan, Say
from bench.runs.steady import STEADY_2000, Steady
from bench.trial import SEED, UNLIMITED, Trial, combined, examine

BARE: Final = "bare aiohttp handler"
NEXHB: Final = "nexhb"
FASTAPI: Final = "FastAPI + INSERT a request"
NEXMDM: Final = "NexMDM's path without bcrypt"
NEXMDM_BCRYPT: Final = "NexMDM's path"
FORMS: Final[Mapping[str, Form]] = {"POST /v1/heartbeats, JSON array": "array", "POST /v1/heartbeats, NDJSON": "ndjson"}
PEERS: Final = ("fastapi", "uvicorn", "httptools", "sqlalchemy", "psycopg")
# server → name of the verdict, and the lower limit of nexhb's rate divided by the server's rate
_TIMES: Final = {
    BARE: ("single heartbeats: share of the bare handler's rate", 0.55),
    FASTAPI: ("times FastAPI + INSERT", 8),
    NEXMDM_BCRYPT: ("rate as a multiple of NexMDM's path", 1000),
    NEXMDM: ("rate as a multiple of NexMDM's path without bcrypt", 40),
}
# 64 connections with 500 heartbeats each exceed the default limits of the queue. A limit that is not reached costs
# nothing.
_SETTINGS: Final = {**UNLIMITED, "NEXHB_INGEST__QUEUE_ITEMS": "40000", "NEXHB_INGEST__QUEUE_BYTES": "67108864"}
# requests/s that these servers do not reach; a run has enough keys and bodies for this rate
_BARE_BOUND, _PEER_BOUND, _HASHED_BOUND, _BODIES_BOUND = 120_000, 6_000, 50, 240
# the fastest of the pool sizes 8, 12 and 20 (3,423, 3,667 and 2,944 requests/s over 64 connections)
_FASTAPI_POOL: Final = 12
# rows per transaction of COPY: its rate is a tenth higher than with 2,000 rows per transaction
_COPY_ROWS: Final = 10_000


@dataclass
class Lane:
    """A server with a number of connections, and its rounds; `requests` makes the requests for a number of seconds."""

    name: str
    server: Server
    connections: int
    requests: Callable[[Target, float], Requests]
    # id of the process that runs the PostgreSQL of a peer
    beside: int | None = None
    rounds: list[LoadRun] = field(default_factory=list)

    async def run(self, seconds: float, warm_s: float) -> None:
        """Load the server as fast as possible and keep the round, counted by heartbeat."""
        requests = self.requests(target(self.server.url), seconds)
        to = requests.to if isinstance(requests, Batches) else target(self.server.url)
        pids, wide = (self.server.pid,), self.connections
        done = await stream(
            to, requests, duration_s=seconds, warm_s=warm_s, connections=wide, pids=pids, beside=self.beside
        )
        if self.name not in (NEXHB, *FORMS) and done.result.ok < done.result.sent:
            # a refusal of nexhb breaks a limit; a peer that refuses is not comparable, so the run ends
            raise stack.StackError(f"{self.name}: {done.result.statuses}, {done.result.failures}")
        self.rounds.append(by_heartbeat(done, requests) if isinstance(requests, Batches) else done)

    @property
    def result(self) -> Result:
        """Return the last round with the medians of all rounds."""
        results = [run.result for run in self.rounds]
        changes = counts_of(results)
        for name in ("rate_per_s", "p50_ms", "p95_ms", "p99_ms", "daemon_us", "postgres_us", "daemon_cores"):
            changes[name] = round(median(getattr(each, name) or 0.0 for each in results), 3)
        return replace(results[-1], **changes)


def by_heartbeat(run: LoadRun, requests: Batches) -> LoadRun:
    """Return a run whose requests have `QUEUE` heartbeats each, with counts, rate, CPU and record by heartbeat."""
    changes = counts_of([run.result], QUEUE) | {"rate_per_s": run.result.rate_per_s * QUEUE}
    for name in ("generator_us", "daemon_us", "postgres_us"):
        changes[name] = (getattr(run.result, name) or 0.0) / QUEUE
    return replace(run, result=replace(run.result, **changes), sends=requests.heartbeats(run.sends))


@dataclass(frozen=True)
class Comparison:
    """The figures of the comparison."""

    # (server, connections) → the medians of the server's rounds
    lanes: Mapping[tuple[str, int], Result]
    # rows/s of COPY in each round
    copies: Sequence[float]
    steady: Percentiles
    floors: Floors
    # rows that the peers acknowledged and that are not in their databases
    lost_by_peers: int

    def best(self, server: str) -> float:
        """Return a server's heartbeats/s with the number of connections that is best for it."""
        return max(result.rate_per_s for (name, _), result in self.lanes.items() if name == server)

    @property
    def p99_bound_ms(self) -> float:
        """Return the limit of the p99: five one-row commits plus 5 ms."""
        return round(5 * self.floors.one_row_commit_ms + 5, 3)

    def verdicts(self) -> list[Verdict]:
        """Return every limit of the comparison, kept or broken."""
        of_copy = {form: round(self.best(form) / median(self.copies), 3) for form in FORMS}
        return [
            *(
                at_least(name, limit, round(self.best(NEXHB) / self.best(server), 2))
                for server, (name, limit) in _TIMES.items()
            ),
            *(at_least(f"{form}: share of raw COPY's rows/s", 0.4, ratio) for form, ratio in of_copy.items()),
            at_most(
                "p99 at 2,000 devices, ms (limit: five one-row commits and 5 ms)", self.p99_bound_ms, self.steady.p99_ms
            ),
            at_most("rows that peers acknowledged but did not store", 0, self.lost_by_peers),
        ]

    def page(self) -> tuple[str, ...]:
        """Return the section of docs/performance.md."""
        rows = [
            (name, figure(connections), *load_cells(result), f"{self.best(NEXHB) / result.rate_per_s:.3g}")
            for (name, connections), result in self.lanes.items()
        ]
        copies = ", ".join(figure(each) for each in self.copies)
        return (
            "",
            markdown(("", "connections", *LOAD_HEAD, "nexhb's best rate ÷ this rate"), rows),
            f"COPY, {_COPY_ROWS:,} rows a transaction: {copies} rows/s.",
            f"A fleet of 2,000 devices on its schedule: {spread(self.steady)}, from the moment each heartbeat was due. "
            f"On the same PostgreSQL: one-row commit {self.floors.one_row_commit_ms:g} ms, SELECT 1 "
            f"{self.floors.select_1_ms:g} ms; five commits and 5 ms are {self.p99_bound_ms:g} ms.",
        )


@dataclass(frozen=True)
class Compare(Plan):
    """nexhb compared with floors and peers, in alternating rounds."""

    QUICK: ClassVar = {
        "steady": STEADY_2000.quicker(), "connections": (256,), "rounds": 1, "round_s": 3.0, "warm_s": 0.7,
        "hashed_devices": 8,
    }  # fmt: skip

    name: str = "compare"
    title: str = "nexhb beside its floors and its peers: one machine, one PostgreSQL, one generator, alternating rounds"
    devices: int = 2000
    # the fleet on its schedule, by which the latency is measured
    steady: Steady = STEADY_2000
    # numbers of connections of nexhb and of the bare handler; the best rate of each counts
    connections: tuple[int, ...] = (64, 256, 1024)
    # number of connections of FastAPI (the best of 32, 64 and 256), of NexMDM (which serves one request at a time), and
    # of nexhb with batches
    peer_connections: int = 64
    # NexMDM with bcrypt has few devices, since making or checking a hash takes a quarter of a second
    hashed_devices: int = 16
    hashed_connections: int = 4
    rounds: int = 3
    round_s: float = 6.0
    warm_s: float = 1.5

    def run(self, say: Say) -> Finding:
        """Measure every part, compare every row, return the finding."""
        if missing := ", ".join(name for name in PEERS if importlib.util.find_spec(name) is None):
            raise stack.StackError(f"not installed: {missing}; run make bench-compare, or pip install -e '.[compare]'")
        compared, trials = uvloop.run(self.measure(say))
        verdicts = (*compared.verdicts(), *worst(each for trial in trials for each in trial.result.verdicts))
        details = {f"{name}, {connections}": asdict(each) for (name, connections), each in compared.lanes.items()}
        cores = tuple(each.others_cores or 0.0 for each in compared.lanes.values())
        return Finding(self.name, self.title, verdicts, {}, details, cores, compared.page())

    async def measure(self, say: Say) -> tuple[Comparison, tuple[Trial, Trial]]:
        """Run the fleet on its schedule, then the rounds; return the figures, and the comparison of every row of the
        fleet and of the rounds."""
        fleet = make_fleet(self.devices, SEED)
        say("the fleet on its schedule")
        with stack.running(fleet) as own:
            calm, floors = await self.steady.sent(own), await floors_of(own)
        with stack.running(fleet, settings=_SETTINGS) as own, contextlib.ExitStack() as ending:
            # the keys of nexhb's batches are older than those of its single heartbeats
            per_round = self._keys_per_round(RATE_BOUND) * len(self.connections)
            bodies = round(_BODIES_BOUND * self.round_s) * len(FORMS) * self.rounds
            queue_buckets = (bodies // self.devices + 1) * QUEUE
            keys = Keys(per_round + queue_buckets * self.devices, self.devices)
            queues, numbers = keys.buckets(queue_buckets), count()

            def batches(form: Form) -> Callable[[Target, float], Requests]:
                def make(to: Target, seconds: float) -> Requests:
                    return Batches(to, fleet, queues, form, islice(numbers, round(_BODIES_BOUND * seconds)))

                return make

            server, wide = Server(own.url, own.pid), self.peer_connections
            lanes = [Lane(name, server, wide, batches(form)) for name, form in FORMS.items()]
            bare = ending.enter_context(process.running("bare_aiohttp"))
            bare_keys = Keys(self._keys_per_round(_BARE_BOUND) * len(self.connections), self.devices)
            for connections in self.connections:
                lanes.append(Lane(BARE, bare, connections, spliced(fleet, bare_keys, _BARE_BOUND)))
                lanes.append(Lane(NEXHB, server, connections, spliced(fleet, keys, RATE_BOUND)))
            lanes += (peers := await self._peers(own, fleet, ending))
            copies = []
            for number in range(self.rounds):
                say(f"round {number + 1}")
                for lane in lanes:
                    await lane.run(self.round_s, self.warm_s)
                copies.append(await copy_rate(own, _COPY_ROWS, self.round_s / 2))
            lost = sum(lane.result.ok for lane in peers)
            for database, table in (("fastapi", "heartbeats"), ("nexmdm", "device_heartbeats")):
                async with own.connected(database) as conn:
                    lost -= await conn.fetchval(f"SELECT count(*) FROM {table}")
            runs = combined([run for lane in lanes if lane.name in (NEXHB, *FORMS) for run in lane.rounds])
            rounds = await examine(own, fleet, runs, NOTHING_DEDUPLICATED)
        results = {(lane.name, lane.connections): lane.result for lane in lanes}
        return Comparison(results, copies, calm.result.latency, floors, lost), (calm, rounds)

    def _keys_per_round(self, bound: int) -> int:
        # enough for one more round, since rounding up to whole buckets uses some keys
        return round(bound * self.round_s * (self.rounds + 1))

    async def _peers(self, own: stack.Stack, fleet: Sequence[Device], ending: contextlib.ExitStack) -> list[Lane]:
        """Create the peers' databases and start their servers: FastAPI, then NexMDM without bcrypt, and unchanged."""
        from bench.peers import fastapi_insert, nexmdm  # noqa: PLC0415 - of the extra `compare`

        async with own.connected() as conn:
            for name in ("fastapi", "nexmdm"):
                await conn.execute(f"CREATE DATABASE {name}")
        async with own.connected("fastapi") as conn:
            await fastapi_insert.prepare(conn, fleet)
        async with own.connected("nexmdm") as conn:
            await nexmdm.prepare(conn, fleet, self.hashed_devices, datetime.now(UTC) - timedelta(days=7))
        of_fastapi = ("fastapi_insert", "--dsn", own.dsn_of("fastapi"), "--pool", f"{_FASTAPI_POOL}")
        of_nexmdm = ("nexmdm", "--dsn", own.dsn_of("nexmdm"))
        without, few = (*of_nexmdm, "--no-bcrypt"), fleet[: self.hashed_devices]
        of_each = [Keys(self._keys_per_round(_PEER_BOUND), self.devices) for _ in range(2)]
        # Both variants of NexMDM write to one database; the variant with bcrypt gets older buckets of its own.
        old = Keys(self._keys_per_round(_HASHED_BOUND), len(few), of_each[1].rest.start)

        def lane(name: str, words: Sequence[str], connections: int, requests: Callable[..., Requests]) -> Lane:
            server = ending.enter_context(process.running(*words))
            return Lane(name, server, connections, requests, own.pid)

        return [
            lane(FASTAPI, of_fastapi, self.peer_connections, spliced(fleet, of_each[0], _PEER_BOUND)),
            lane(NEXMDM, without, self.peer_connections, spliced(fleet, of_each[1], _PEER_BOUND)),
            lane(NEXMDM_BCRYPT, of_nexmdm, self.hashed_connections, spliced(few, old, _HASHED_BOUND)),
        ]


def spliced(fleet: Sequence[Device], keys: Keys, bound: int) -> Callable[[Target, float], Requests]:
    """Return a function that makes requests of the next keys, enough for `bound` requests per second."""
    return lambda to, seconds: Spliced(to, fleet, keys.holding(round(bound * seconds)))
