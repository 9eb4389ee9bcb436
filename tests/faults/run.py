"""One seed: devices send, the nemesis works, all is healed, the devices drain, everything is read once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.faults import (
    faketime,
    kinds_clocks,
    kinds_databases,
    kinds_limits,
    kinds_lines,
    kinds_listeners,
    kinds_processes,
    kinds_sessions,
    kinds_stores,
    kinds_tables,
    kinds_tokens,
    logs,
)
from tests.faults.check import Violation, check
from tests.faults.cluster import until_up
from tests.faults.kinds_tables import HOSTILE, SENT_AWAY, send_days_away
from tests.faults.nemesis import Kind, Struck, schedule, unleash
from tests.faults.record import What
from tests.faults.world import World

KINDS: tuple[Kind, ...] = (
    *kinds_processes.KINDS,
    *kinds_lines.KINDS,
    *kinds_tables.KINDS,
    *kinds_sessions.KINDS,
    *kinds_limits.KINDS,
    *kinds_databases.KINDS,
    *kinds_tokens.KINDS,
    *kinds_clocks.KINDS,
    *kinds_listeners.KINDS,
    *kinds_stores.KINDS,
)
FIRST_S = 60.0  # for the first start
READY_S = 15.0  # from the healing until the daemon can commit
STILL_S = 15.0  # a device that holds heartbeats, and for so long hears of none that it is in, is stuck
DRAIN_S = 600.0  # from then until no device holds anything; 1 to 5 s where the machine has nothing else to do
NIGHT_S = 30.0  # a nightly run, when all is well again
LOOK_S = 0.02
_SEND_DAYS_AWAY = (SENT_AWAY, HOSTILE, kinds_limits.FULL_SPOOL, kinds_stores.ANOTHER)
_SETTLED = ("hb_writes_total", "hb_dedupe_total", "nexhb_heartbeats_refused_total", "nexhb_heartbeats_failed_total")


@dataclass
class Outcome:
    """What came of one seed."""

    seed: int
    seconds: float = 0.0  # of faults
    struck: list[Struck] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[What] = field(default_factory=Counter)
    ready_s: float = 0.0
    drained_s: float = 0.0
    starts: int = 0  # of daemons
    ended_by_itself: list[int] = field(default_factory=list)

    def count(self, what: str) -> int:
        """Violations by their word."""
        return sum(one.what == what for one in self.violations)


def possible(world: World, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds that can be carried out here."""
    cluster = world.cluster
    return [
        kind
        for kind in kinds
        if (cluster is not None or not kind.own_cluster)
        and (not kind.small_disk or (cluster and cluster.small_disk))
        and (not kind.own_clock or faketime.library())
    ]


async def live(world: World, seconds: float, kinds: Sequence[Kind] = KINDS) -> Outcome:
    """The whole of it."""
    outcome = Outcome(world.seed)
    if not await begin(world, outcome):
        return outcome
    began = time.monotonic()
    outcome.struck = await unleash(world, schedule(world.seed, possible(world, kinds), seconds))
    outcome.seconds = time.monotonic() - began
    await conclude(world, outcome, logs.QUIET_S)
    return outcome


async def begin(world: World, outcome: Outcome) -> bool:
    """Whether the daemon is ready for the first time."""
    if await world.daemons[0].ready(FIRST_S) is None:
        _stuck(outcome, f"the daemon was not ready within {FIRST_S:.0f} s of its first start")
        return False
    return True


async def conclude(world: World, outcome: Outcome, quiet_s: float) -> None:
    """What comes behind the faults: everything is healed, the devices drain, and everything is read. For `quiet_s`
    nothing happens, and the logs must be silent."""
    outcome.violations += blamed(world)
    await _heal(world, outcome)
    healed_at = datetime.now(UTC)
    if not outcome.violations:
        if world.forgiven:
            await kinds_databases.accept(world)
        await world.guests.settle()
        await asyncio.sleep(quiet_s)
        await _counters(world, outcome)
    outcome.violations += misheard(world)
    quiet = healed_at, datetime.now(UTC)
    for daemon in world.daemons:
        code = await daemon.stop(signal.SIGTERM)
        if code != 0:
            _stuck(outcome, f"the daemon was told to stop and ended with {code}")
    if any(one.fault.kind.name in _SEND_DAYS_AWAY for one in outcome.struck):
        code = await send_days_away(world, NIGHT_S, **world.bucket.reading)
        if code != 0:
            _stuck(outcome, f"a nightly run behind the healing ended with {code}")
    outcome.violations += await check(world)
    outcome.violations += await asyncio.to_thread(logged, world, quiet)
    outcome.counts = world.record.counts
    outcome.starts = sum(daemon.starts for daemon in world.daemons)
    outcome.ended_by_itself = [code for daemon in world.daemons for code in daemon.ended_by_itself]


def blamed(world: World) -> list[Violation]:
    """What a fault found broken."""
    return [Violation(what, -1, None, why) for what, why in world.blamed]


def misheard(world: World) -> list[Violation]:
    """The answers that a token may not hear, so far."""
    return [Violation("wrong", device, None, why) for device, why in world.guests.wrong]


def logged(world: World, quiet: tuple[datetime, datetime]) -> list[Violation]:
    """What no fault explains in what was logged; `quiet` is a time in which nothing was broken."""
    entries = logs.read_files(path for daemon in world.daemons for path in daemon.logs)
    said = [*logs.unexpected(entries), *logs.repeating(entries, *quiet)]
    ends = sum(len(daemon.ended_by_itself) for daemon in world.daemons)
    if ends > (told := sum(one.event == "daemon.not_started" for one in entries)):
        said.append(f"a daemon ended by itself {ends} times, and said so {told} times")
    return [Violation("unexpected", -1, None, one) for one in said]


def _stuck(outcome: Outcome, why: str) -> Outcome:
    outcome.violations.append(Violation("stuck", -1, None, why))
    return outcome


async def _heal(world: World, outcome: Outcome) -> None:
    """Nothing is broken any more; everything must come back by itself, within its bound."""
    for relay in (world.front, *world.proxies):
        relay.heal()
    if world.cluster is not None:
        await until_up(world.cluster, FIRST_S)
    for kiosk in world.kiosks:
        kiosk.stop_making()
    ready_s = await world.daemons[0].ready(READY_S)
    if ready_s is None:
        _stuck(outcome, f"the daemon was not ready within {READY_S:.0f} s of the healing")
        return
    outcome.ready_s = ready_s
    began = time.monotonic()
    if not await _drained(world, began):
        still = {kiosk.number: kiosk.held for kiosk in world.kiosks if not kiosk.is_empty}
        _stuck(outcome, f"{time.monotonic() - began:.0f} s after the healing devices still hold heartbeats: {still}")
    outcome.drained_s = time.monotonic() - began


async def _drained(world: World, began: float) -> bool:
    """Whether all get rid of all, each of them steadily."""
    moved = dict.fromkeys(range(len(world.kiosks)), (0, began))  # acknowledged so far, and when that last grew
    while left := [kiosk for kiosk in world.kiosks if not kiosk.is_empty]:
        now = time.monotonic()
        for kiosk in left:
            if kiosk.acknowledged > moved[kiosk.number][0]:
                moved[kiosk.number] = (kiosk.acknowledged, now)
            if now - moved[kiosk.number][1] > STILL_S or now - began > DRAIN_S:
                return False
        await asyncio.sleep(LOOK_S)
    return True


async def _counters(world: World, outcome: Outcome) -> None:
    """The ledger of the daemon that lives at the end: received is what was settled, and what is unanswered."""
    found = await world.daemons[0].metrics()
    received, unanswered = found["heartbeats_ingested_total"], found["nexhb_intake_items"]
    settled = {name: found.get(name, 0.0) for name in _SETTLED}
    if received != sum(settled.values()) + unanswered:
        story = f"{received:.0f} received are not {settled} and {unanswered:.0f} unanswered"
        outcome.violations.append(Violation("wrong", -1, None, f"the counters do not add up: {story}"))
