"""Scenarios with agents, which keep each heartbeat until it is acknowledged: they all come back at once (4-reconnect),
the daemon is killed (kill), the database is stopped for minutes (outage)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import uvloop

from bench import stack
from bench.cost import forget_peak
from bench.finding import Finding
from bench.fleet import make_fleet, replays, schedule
from bench.load import LoadRun, agents, target
from bench.report import Limit
from bench.runs import Plan, Say
from bench.trial import SEED, examine

# The server may refuse requests here, since the agent sends again; in the end no agent may have heartbeats left.
_KEPT: Final = (
    Limit("every heartbeat acknowledged", "left", 0),
    Limit("no queue overflowed", "dropped", 0),
    Limit("heartbeats acknowledged", "ok", 1, "at_least"),
)


@dataclass(frozen=True)
class Reconnect(Plan):
    """All devices come back at once after an outage and drain their queues, oldest heartbeat first."""

    QUICK: ClassVar = {"queue": 10}

    name: str = "4-reconnect"
    title: str = "2,000 devices back within a second, 30 heartbeats each"
    devices: int = 2000
    queue: int = 30
    bound_s: float = 120

    def run(self, say: Say) -> Finding:
        """Let the agents drain their queues, compare every row; return the finding."""
        fleet, queues = make_fleet(self.devices, SEED), replays(self.devices, 60, self.queue, 1, SEED)
        with stack.running(fleet) as own:
            run = uvloop.run(agents(target(own.url), fleet, bound_s=self.bound_s, queues=queues, pids=(own.pid,)))
            trial = uvloop.run(examine(own, fleet, run, _KEPT))
        extra = trial.result.extra
        figures = {"drained": f"in {extra['drained_s']} s, {extra['retries']} requests sent again"}
        return trial.finding(self.name, self.title, figures=figures)


@dataclass(frozen=True)
class _OnSchedule(Plan):
    """A fleet of agents that send on their schedule while something happens."""

    devices: int = 2000
    duration_s: float = 60
    # time after the schedule's end for the agents to empty their queues
    drain_s: float = 120

    async def _sent(self, own: stack.Stack, *, pids: tuple[int, ...] = ()) -> LoadRun:
        plan, bound_s = schedule(self.devices, 60, 15, self.duration_s, SEED), self.duration_s + self.drain_s
        return await agents(target(own.url), make_fleet(self.devices, SEED), plan=plan, bound_s=bound_s, pids=pids)


@dataclass(frozen=True)
class Kill(_OnSchedule):
    """The daemon is killed after a third of the schedule and started again."""

    QUICK: ClassVar = {"duration_s": 20.0}

    name: str = "kill"
    title: str = "2,000 devices at 60 s ± 15 s, the daemon killed at a third of it and started again"

    def run(self, say: Say) -> Finding:
        """Send, kill the daemon and start it again meanwhile, compare every row; return the finding."""
        limits = (*_KEPT, Limit("sends that failed while the daemon was down", "failed", 1, "at_least"))
        with stack.running(fleet := make_fleet(self.devices, SEED)) as own:
            sent, again_s = uvloop.run(self._sent_meanwhile(own))
            trial = uvloop.run(examine(own, fleet, sent, limits))
        figures = {"killed": f"at {self.duration_s / 3:.0f} s, ready again {again_s:.2f} s later"}
        return trial.finding(self.name, self.title, figures=figures)

    async def _sent_meanwhile(self, own: stack.Stack) -> tuple[LoadRun, float]:
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(self._kill_and_start(own))
            return await self._sent(own), await killing

    async def _kill_and_start(self, own: stack.Stack) -> float:
        """Kill the daemon and start it again; return the seconds from the kill until it could commit."""
        await asyncio.sleep(self.duration_s / 3)
        began = time.monotonic()
        await asyncio.to_thread(own.kill)
        await asyncio.to_thread(own.start)
        return time.monotonic() - began


@dataclass(frozen=True)
class Outage(_OnSchedule):
    """The database is stopped for minutes: every heartbeat that the agents kept must be stored with its own time."""

    QUICK: ClassVar = {"duration_s": 30.0, "before_s": 5.0, "outage_s": 20.0}

    name: str = "outage"
    title: str = "2,000 agents at 60 s ± 15 s, PostgreSQL away for ten minutes"
    duration_s: float = 720
    drain_s: float = 420
    before_s: float = 60
    outage_s: float = 600
    limits: tuple[Limit, ...] = (
        *_KEPT,
        Limit("sends without a response", "failed", 0),
        Limit("responses other than 200 and 503", "other_responses", 0),
        Limit("responses of 503 meanwhile, at least", "refused", 1, "at_least"),
        # half of the agent's timeout, which is 30 s
        Limit("longest wait for a response, below 15 s", "longest_wait_s", 15),
        Limit("ready again within 10 s", "ready_s", 10),
        Limit("growth of the daemon's memory, below 50 MB", "growth_mb", 50),
    )

    def run(self, say: Say) -> Finding:
        """Send, stop the database and start it again meanwhile, compare every row; return the finding."""
        fleet = make_fleet(self.devices, SEED)
        with (
            stack.postgres() as (_, postgres),
            stack.running(fleet, settings={stack.DATABASE_URL: postgres.dsn}) as own,
        ):
            sent, (ready_s, before_mb) = uvloop.run(self._sent_meanwhile(own, postgres))
            growth_mb = round(own.memory().peak_mb - before_mb, 1)
            result = sent.result.with_extra(ready_s=ready_s, growth_mb=growth_mb)
            trial = uvloop.run(examine(own, fleet, replace(sent, result=result), self.limits))
        figures = {
            "away": f"{self.outage_s:g} s, daemon ready again {ready_s} s after PostgreSQL's return",
            "responses": f"{result.ok:,} times 200, {result.refused:,} times 503",
            "memory": f"{before_mb:g} MB before, {growth_mb:+g} MB at most",
        }
        if drained_s := result.extra["drained_s"]:
            figures["kept"] = f"all stored {drained_s - self.before_s - self.outage_s:.1f} s after PostgreSQL's return"
        return trial.finding(self.name, self.title, figures=figures)

    async def _sent_meanwhile(self, own: stack.Stack, postgres: stack.Postgres) -> tuple[LoadRun, tuple[float, float]]:
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(self._stop_and_start(own, postgres))
            return await self._sent(own, pids=(own.pid,)), await stopping

    async def _stop_and_start(self, own: stack.Stack, postgres: stack.Postgres) -> tuple[float, float]:
        """Stop and start PostgreSQL; return the seconds until the daemon was ready, and its memory before the stop."""
        await asyncio.sleep(self.before_s)
        before_mb = own.memory().rss_mb
        forget_peak(own.pid)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(self.outage_s)
        await asyncio.to_thread(postgres.start)
        began = time.monotonic()
        while True:
            if await asyncio.to_thread(own.ready):
                return round(time.monotonic() - began, 3), before_mb
            await asyncio.sleep(0.02)
