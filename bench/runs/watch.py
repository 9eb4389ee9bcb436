"""The watcher with a million devices: what its rounds cost, and what they cost the heartbeats beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from statistics import median
from typing import Any, ClassVar, Final, NamedTuple

import uvloop

from bench import stack
from bench.cost import process_cpu_s
from bench.finding import Finding, figure, markdown
from bench.fleet import make_accounts
from bench.load import Keys, LoadRun, Spliced, due_times, stream, target
from bench.report import NOTHING_DEDUPLICATED, SendLog, at_least, at_most, judge, percentiles
from bench.runs import Plan, Say
from bench.runs.changing import CHOOSE, FILL, Fleet
from bench.runs.curve import add_accounts
from bench.trial import SEED
from nexhb.config import Settings
from nexhb.messages.routes import Route
from nexhb.messages.telling import Teller
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from nexhb.readiness import Readiness
from nexhb.watching.judging import watch_rules
from nexhb.watching.watcher import SESSION, Watcher

_ROUND_S: Final = 10.0  # watch.interval_seconds
_ROUTE: Final = Route("bench", "https://example.com", "whsec_", kinds=frozenset({"offline", "unity_down"}))
_UPDATES: Final = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'device_last_status'"
_EVENTS: Final = "SELECT coalesce(max(event_id), 0) FROM device_events"
_END_WATCHER: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb watch'"


class Cost(NamedTuple):
    """What a round cost: seconds in all, and of the CPU of its backend and of this process."""

    name: str
    events: int
    seconds: float
    postgres_s: float
    python_s: float


class Phase(NamedTuple):
    """A part of the load, with the watcher or without it; times in seconds from the start of the load."""

    is_watched: bool
    start_s: float
    end_s: float
    rounds: float
    updates: int
    hot: int


@dataclass(frozen=True)
class Watch(Plan):
    """Rounds with a million devices, and heartbeats with and without the watcher beside them."""

    QUICK: ClassVar = {"devices": 100_000, "rounds": 2, "phases": 2}

    name: str = "watch"
    title: str = "the watcher of a million devices, 1% of which change their state in a minute"
    devices: int = 1_000_000
    changing: float = 0.01  # the share of devices that change in a minute
    rounds: int = 6
    per_site: int = 20
    senders: int = 20_000
    rate_per_s: float = 333
    # Phases without the watcher and with it alternate. For a minute after each five-minute slot, updates are not HOT:
    # a phase of each kind shares such a minute.
    phases: int = 8
    phase_s: float = 30.0

    def run(self, say: Say) -> Finding:
        """Measure the rounds, then the heartbeats beside the watcher; return the finding."""
        with stack.running() as own:
            costs, phases, sent = uvloop.run(self._measure(own, say))
        p99_ms, hot = {}, {}
        for is_watched in (False, True):
            of = [phase for phase in phases if phase.is_watched is is_watched]
            p99_ms[is_watched] = median(_latency(sent.sends, phase)[2] for phase in of)
            hot[is_watched] = sum(phase.hot for phase in of) / sum(phase.updates for phase in of)
        ordinary = [each for each in costs if each.name.startswith("round ")]
        verdicts = (
            at_most("a round: seconds of PostgreSQL's CPU", 1, max(each.postgres_s for each in ordinary)),
            at_most("p99 with the watcher, divided by p99 without", 1.5, p99_ms[True] / p99_ms[False]),
            at_least("share of HOT updates with the watcher, minus that without", -0.05, hot[True] - hot[False]),
            *judge(sent.result, NOTHING_DEDUPLICATED).verdicts,
        )
        load = asdict(replace(sent.result, verdicts=()))
        details = {"rounds": costs, "phases": phases, "load": load}
        cores = (sent.result.others_cores or 0.0,)
        return Finding(self.name, self.title, verdicts, {}, details, cores, self._page(costs, phases, sent.sends))

    async def _measure(self, own: stack.Stack, say: Say) -> tuple[list[Cost], list[Phase], LoadRun]:
        """Fill the database, measure the rounds, then the load. All this time `conn` holds the watcher's lock, except
        in the phases with the daemon's watcher."""
        to, accounts = target(own.url), make_accounts(self.senders, SEED)
        lasts_s, per_s = self.phases * self.phase_s, self.devices * self.changing / 60
        due_us = due_times((self.rate_per_s, lasts_s))
        keys = Keys(len(due_us) + 2 * self.senders, self.senders)
        database, settings = Database(own.dsn), dict[str, Any](SESSION)
        watching = await database.connect(application="nexhb bench", command_timeout_s=600, **settings)
        async with own.connected() as conn:
            await _hold(watching)
            await conn.execute("DELETE FROM watch")  # the daemon has adopted an empty fleet
            await add_accounts(own, accounts)
            await stream(to, Spliced(to, accounts, keys.buckets(1)), connections=256, duration_s=60)
            for statement, arguments in FILL:
                await conn.execute(statement, *[getattr(self, name) for name in arguments])
            say(f"{self.devices:,} devices; their states are adopted")
            chosen = await conn.fetch(CHOOSE, round(1.1 * per_s * (lasts_s + (self.rounds + 7) * _ROUND_S)))
            fleet = Fleet(conn, [row["device_no"] for row in chosen])
            costs = await self._rounds(watching, database, fleet, per_s)
            say(f"{self.rate_per_s:g} heartbeats/s for {lasts_s:g} s, in turn without and with the watcher")
            started = asyncio.Event()
            phases = asyncio.create_task(self._phases(own, watching, fleet, per_s, started))
            requests = Spliced(to, accounts, keys.holding(len(due_us)))
            sent = await stream(
                to, requests, due_us, duration_s=lasts_s, connections=500, pids=(own.pid,), started=started.set
            )
            await watching.close()
            return costs, await phases, sent

    async def _rounds(self, conn: Connection, database: Database, fleet: Fleet, per_s: float) -> list[Cost]:
        """Run rounds; before each, so many devices change their state as do between two rounds."""
        teller = Teller([_ROUTE], Readiness())
        watcher = Watcher(database, watch_rules(Settings()), _ROUND_S, lambda: datetime.now(UTC), tell=teller)
        pid, costs = conn.get_server_pid(), []
        changes = [
            ("the first round, which adopts every state", 0.0),
            ("the second, which looks at every silent device", 0.0),
        ]
        changes += [(f"round {number} of {self.rounds}", per_s * _ROUND_S) for number in range(1, self.rounds + 1)]
        for name, number in (*changes, ("a minute in one round", per_s * 60), ("a round without changes", 0.0)):
            await fleet.change(round(number))
            events = await fleet.conn.fetchval(_EVENTS)
            postgres_s, python_s, start = process_cpu_s(pid), time.process_time(), time.perf_counter()
            await watcher.round(conn)
            seconds, python_s = time.perf_counter() - start, time.process_time() - python_s
            postgres_s = process_cpu_s(pid) - postgres_s
            events = await fleet.conn.fetchval(_EVENTS) - events
            costs.append(Cost(name, events, *(round(each, 3) for each in (seconds, postgres_s, python_s))))
        return costs

    async def _phases(
        self, own: stack.Stack, watching: Connection, fleet: Fleet, per_s: float, started: asyncio.Event
    ) -> list[Phase]:
        """Let the daemon watch in every second phase, and change states in each. Return the phases."""
        await started.wait()
        start, phases = time.monotonic(), []
        for number in range(self.phases):
            is_watched = number % 2 == 1
            if is_watched:
                await watching.execute("SELECT pg_advisory_unlock_all()")
            else:
                await _hold(watching)
            before = await self._counts(own, fleet)
            for second in range(round(self.phase_s)):
                await asyncio.sleep(max(0.0, start + number * self.phase_s + second - time.monotonic()))
                await fleet.change(round(per_s))
            await asyncio.sleep(max(0.0, start + (number + 1) * self.phase_s - time.monotonic()))
            rounds, updates, hot = (
                now - then for now, then in zip(await self._counts(own, fleet), before, strict=True)
            )
            at_s = number * self.phase_s
            phases.append(Phase(is_watched, at_s, at_s + self.phase_s, rounds, int(updates), int(hot)))
        return phases

    @staticmethod
    async def _counts(own: stack.Stack, fleet: Fleet) -> tuple[float, float, float]:
        rounds = (await asyncio.to_thread(own.metrics))["nexhb_watch_rounds_total"]
        row = await fleet.conn.fetchrow(_UPDATES)
        return rounds, row[0], row[1]

    def _page(self, costs: Sequence[Cost], phases: Sequence[Phase], sends: SendLog) -> tuple[str, ...]:
        """Return the section of docs/performance.md."""
        intro = (
            "## The watcher of a million devices\n\n"
            f"{self.devices:,} devices in sites of {self.per_site}, of which 1% have been silent for long, and "
            f"{self.changing:.0%} change their state in a minute: half of them report that Unity stopped, half fall "
            f"silent. There is a round for every {_ROUND_S:g} s of such changes. Each incident is told to a route. "
            '"PostgreSQL s" is the CPU time of the watcher\'s backend.'
        )
        head = ("", "events", "seconds", "PostgreSQL s", "Python s")
        rows = [(each.name, *map(figure, each[1:])) for each in costs]
        beside = (
            f"Then {self.senders:,} of these devices send {self.rate_per_s:g} heartbeats a second to a daemon, whose "
            "watcher pauses in every second phase, while devices go on to change their state in all phases."
        )
        load = [
            ("with" if each.is_watched else "without", figure(each.rounds), *map(figure, _latency(sends, each)),
             f"{each.hot / each.updates:.1%}")
            for each in phases
        ]  # fmt: skip
        return (
            intro,
            markdown(head, rows),
            beside,
            markdown(("watcher", "rounds", "p50 ms", "p95 ms", "p99 ms", "HOT"), load),
        )


def _latency(sends: SendLog, phase: Phase) -> tuple[float, float, float]:
    of = percentiles(sends.due_in(phase.start_s, phase.end_s).latencies())
    return of.p50_ms or 0.0, of.p95_ms or 0.0, of.p99_ms or 0.0


async def _hold(conn: Connection) -> None:
    """Take the watcher's lock away from the daemon."""
    while not await conn.fetchval("SELECT pg_try_advisory_lock($1)", int(Lock.WATCH)):
        await conn.execute(_END_WATCHER)
        await asyncio.sleep(0.05)
