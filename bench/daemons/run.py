"""The run: rounds with more and more daemons, the same heartbeats to all, a job on all, and daemons on other hosts."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
import uvloop

from bench import old_days, stack
from bench.check import Check, check
from bench.cost import machine_cpu_s, own_cpu_s, process_cpu_s, tree_cpu_s
from bench.daemons import hosts
from bench.daemons.found import Copies, Found, Round
from bench.fleet import Device, make_fleet
from bench.load import RATE_BOUND, Keys, LoadRun, Span, closed_loop, recent_span, target
from bench.load.pool import RequestPool
from bench.report import SendLog
from bench.runs.outage import Elsewhere
from bench.scenarios import DaemonsScenario
from bench.stack import Stack

_SEED: Final = 1
# as short as the accept window allows
_RETENTION_DAYS: Final = 7
_SETTINGS: Final = {
    "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000",
    "NEXHB_INGEST__DEVICE_BURST": "1000000",
    "NEXHB_PARTITIONS__RETENTION_DAYS": f"{_RETENTION_DAYS}",
}
_NIGHTLY_S: Final = 300.0


def run(plan: DaemonsScenario, told: Callable[[str], None]) -> Found:
    """All of it."""
    with _elsewhere() as (folder, postgres):
        found = _on_one_host(plan, folder, postgres, told)
    no_hosts = hosts.lacking()
    if no_hosts:
        return found.found(no_hosts)
    told(f"{plan.hosts} hosts")
    with _elsewhere() as (folder, postgres), hosts.made(plan.hosts) as there:
        return found.found("", _on_hosts(plan, folder, postgres, there))


@contextlib.contextmanager
def _elsewhere() -> Iterator[tuple[Path, Elsewhere]]:
    """A PostgreSQL that no daemon owns."""
    with stack.run_folder() as folder:
        postgres = Elsewhere(folder / "elsewhere")
        try:
            yield folder, postgres
        finally:
            postgres.stop()


class _Part(NamedTuple):
    """Rounds against one database, and what it says of every row."""

    rounds: list[Round]
    runs: list[LoadRun]
    check: Check

    @property
    def lacking(self) -> int:
        """Requests that were not acknowledged."""
        return sum(run.result.sent - run.result.ok for run in self.runs)


class _OneHost(NamedTuple):
    part: _Part
    copies: Copies
    jobs: Sequence[dict[str, Any]]

    def found(self, no_hosts: str, other: _Part | None = None) -> Found:
        """With what was found on several hosts, where there are any."""
        parts = {"one host": self.part, "several hosts": other}
        there = {name: part for name, part in parts.items() if part is not None}
        return Found(
            rounds=tuple(each for part in there.values() for each in part.rounds),
            copies=self.copies,
            jobs=Counter(str(answer["status"]) for answer in self.jobs),
            reasons=tuple(answer["reason"] for answer in self.jobs if answer["status"] == "skipped"),
            checks={name: (part.check.missing, part.check.unexpected) for name, part in there.items()},
            lacking=sum(part.lacking for part in there.values()),
            no_hosts=no_hosts,
        )


# ── one host ─────────────────────────────────────────────────────────────────────────────────────────────


def _on_one_host(plan: DaemonsScenario, folder: Path, postgres: Elsewhere, told: Callable[[str], None]) -> _OneHost:
    fleet = make_fleet(plan.devices, _SEED)
    most = max(plan.numbers)
    requests = round(RATE_BOUND * (plan.warm_s + plan.round_s)) * len(plan.numbers)
    span = recent_span(requests + (len(plan.numbers) + plan.copies_beats) * len(fleet), len(fleet), _now_us())
    keys = Keys(span, len(fleet))
    rounds, runs = [], []
    with contextlib.ExitStack() as ending:
        port = stack.free_port()
        daemons: list[Stack] = []
        for number in plan.numbers:
            while len(daemons) < number:
                daemons.append(_started(ending, folder, f"daemon-{len(daemons) + 1}", postgres.dsn, port))
                if len(daemons) == 1:
                    daemons[0].import_fleet(fleet)
            told(f"{number} daemon{'s' if number > 1 else ''} on one host")
            at = _Costs(daemons, folder)
            done = uvloop.run(_round(plan, f"http://127.0.0.1:{port}", fleet, keys.take(requests // len(plan.numbers))))
            runs.append(done)
            rounds.append(at.round(f"{number} on one host", [done]))
        told(f"the same heartbeats to {most} daemons")
        copies, sent = uvloop.run(_copied(plan, daemons, fleet, keys.buckets(plan.copies_beats)))
        runs += sent
        part = _Part(rounds, runs, uvloop.run(_checked(postgres.dsn, fleet, runs)))
        told(f"the nightly run on {most} daemons at once")
        uvloop.run(_old_day(postgres.dsn, fleet, plan.old_beats))
        with ThreadPoolExecutor(most) as threads:
            jobs = list(threads.map(lambda own: own.post("/ops/nightly", timeout_s=_NIGHTLY_S)[1], daemons))
    return _OneHost(part, copies, jobs)


def _started(ending: contextlib.ExitStack, folder: Path, name: str, dsn: str, shared_port: int) -> Stack:
    own_folder = folder / name
    own_folder.mkdir()
    settings = _SETTINGS | {stack.DATABASE_URL: dsn, "NEXHB_ARCHIVE__URL": f"file://{folder}/archive"}
    own = Stack(own_folder, settings, shared_port=shared_port)
    ending.callback(own.stop)
    own.start()
    return own


def _now_us() -> int:
    return time.time_ns() // 1000


async def _round(plan: DaemonsScenario, url: str, fleet: Sequence[Device], span: Span) -> LoadRun:
    return await closed_loop(
        target(url),
        fleet,
        connections=plan.connections,
        duration_s=plan.warm_s + plan.round_s,
        warm_s=plan.warm_s,
        span=span,
    )


class _Costs:
    """CPU and staged batches of daemons and of their PostgreSQL, from now on."""

    def __init__(self, daemons: Sequence[Stack], folder: Path) -> None:
        self._daemons = daemons
        self._postmaster = int((folder / "elsewhere" / "pg" / "postmaster.pid").read_text().split()[0])
        self._before = self._clocks()
        self._staged = self._counted()

    def round(self, name: str, runs: Sequence[LoadRun]) -> Round:
        """What was used since, the load's beginning included."""
        at_s, *used = (now - then for now, then in zip(self._clocks(), self._before, strict=True))
        daemons, postgres, generator, machine = (each / at_s for each in used)
        return Round(
            name,
            len(self._daemons),
            sum(run.result.rate_per_s for run in runs),
            max((run.result.p99_ms for run in runs if run.result.p99_ms is not None), default=None),
            round(daemons, 2),
            round(postgres, 2),
            round(generator, 2),
            round(max(0.0, machine - daemons - postgres - generator), 2),
            self._counted() - self._staged,
        )

    def _clocks(self) -> tuple[float, ...]:
        daemons = sum(process_cpu_s(own.pid) or 0.0 for own in self._daemons)
        return time.monotonic(), daemons, tree_cpu_s(self._postmaster) or 0.0, own_cpu_s(), machine_cpu_s()

    def _counted(self) -> int:
        return sum(round(own.metrics().value("nexhb_staging_batches_total") or 0) for own in self._daemons)


async def _copied(
    plan: DaemonsScenario, daemons: Sequence[Stack], fleet: Sequence[Device], span: Span
) -> tuple[Copies, list[LoadRun]]:
    """Every daemon hears the same, in the same order, at the same time."""

    async def counted() -> int:
        found = [await asyncio.to_thread(own.metrics) for own in daemons]
        return sum(round(each.value("nexhb_staging_batches_total") or 0) for each in found)

    before = await counted()
    pools = [RequestPool(target(own.url), fleet, span) for own in daemons]
    runs = await asyncio.gather(
        *(
            closed_loop(
                target(own.url), fleet, connections=plan.copies_connections, duration_s=120, warm_s=0, requests=pool
            )
            for own, pool in zip(daemons, pools, strict=True)
        )
    )
    results = [run.result for run in runs]
    written = sum(result.ok - result.deduplicated for result in results)
    acknowledged = sum(result.ok for result in results)
    return Copies(len(daemons), len(pools[0]), acknowledged, written, await counted() - before), list(runs)


async def _checked(dsn: str, fleet: Sequence[Device], runs: Sequence[LoadRun]) -> Check:
    record = SendLog()
    for each in runs:
        record.extend(each.sends)
    conn = await _connect(dsn)
    try:
        return await check(conn, fleet, record)
    finally:
        await conn.close(timeout=5)


async def _old_day(dsn: str, fleet: Sequence[Device], beats: int) -> None:
    conn = await _connect(dsn)
    try:
        day = (datetime.now(UTC) - timedelta(days=_RETENTION_DAYS + 2)).date()
        await old_days.make(conn, fleet, day, beats, _SEED)
    finally:
        await conn.close(timeout=5)


async def _connect(dsn: str) -> asyncpg.Connection:
    return await asyncpg.connect(dsn, timeout=10, command_timeout=600, server_settings={"timezone": "UTC"})


# ── several hosts ────────────────────────────────────────────────────────────────────────────────────────


def _on_hosts(plan: DaemonsScenario, folder: Path, postgres: Elsewhere, there: Sequence[hosts.Host]) -> _Part:
    fleet = make_fleet(plan.devices, _SEED)
    password = secrets.token_urlsafe(24)
    _open(folder, postgres, there, password)
    requests = round(RATE_BOUND * (plan.warm_s + plan.round_s))
    keys = Keys(recent_span((requests + len(fleet)) * len(there), len(fleet), _now_us()), len(fleet))
    with contextlib.ExitStack() as ending:
        daemons: list[Stack] = []
        for host in there:
            own_folder = folder / host.name
            own_folder.mkdir()
            dsn = f"postgresql://nexhb:{password}@{host.gateway}:5432/nexhb"
            own = hosts.StackThere(own_folder, _SETTINGS | {stack.DATABASE_URL: dsn}, host)
            ending.callback(own.stop)
            own.start()
            daemons.append(own)
        daemons[0].import_fleet(fleet)
        spans = [keys.take(requests) for _ in there]
        at = _Costs(daemons, folder)
        with ThreadPoolExecutor(len(there)) as threads:

            def load(place: int) -> LoadRun:
                own = daemons[place]
                return there[place].do(lambda: uvloop.run(_round(plan, own.url, fleet, spans[place])))

            runs = list(threads.map(load, range(len(there))))
        rounds = [at.round(f"{len(there)} on {len(there)} hosts", runs)]
        return _Part(rounds, runs, uvloop.run(_checked(postgres.dsn, fleet, runs)))


def _open(folder: Path, postgres: Elsewhere, there: Sequence[hosts.Host], password: str) -> None:
    """Let hosts in by TCP, at their cables' ends and with a password."""
    addresses = ",".join(host.gateway for host in there)
    uvloop.run(
        _told(
            postgres.dsn,
            f"ALTER SYSTEM SET listen_addresses = '{addresses}'",
            f"ALTER ROLE nexhb PASSWORD '{password}'",
        )
    )
    postgres.stop()
    postgres.start()
    # written anew at each start
    with (folder / "elsewhere" / "pg" / "pg_hba.conf").open("a", encoding="utf-8") as rules:
        rules.writelines(f"host nexhb nexhb {host.gateway}/30 scram-sha-256\n" for host in there)
    uvloop.run(_told(postgres.dsn, "SELECT pg_reload_conf()"))


async def _told(dsn: str, *statements: str) -> None:
    conn = await _connect(dsn)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close(timeout=5)
