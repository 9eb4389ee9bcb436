"""Run one seed: devices send while faults occur. Then all faults end, the devices drain their queues, and everything is
read once."""

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
    kinds_connections,
    kinds_databases,
    kinds_listeners,
    kinds_processes,
    kinds_resources,
    kinds_sessions,
    kinds_stores,
    kinds_tables,
    kinds_tokens,
    logs,
)
from tests.faults.check import Violation, check
from tests.faults.cluster import until_up
from tests.faults.journal import Event
from tests.faults.kinds_tables import DAYS_ARCHIVED, FAULTY_STORE, archive_days
from tests.faults.nemesis import FaultKind, InjectedFault, inject, schedule
from tests.faults.world import World

KINDS: tuple[FaultKind, ...] = (
    *kinds_processes.KINDS,
    *kinds_connections.KINDS,
    *kinds_tables.KINDS,
    *kinds_sessions.KINDS,
    *kinds_resources.KINDS,
    *kinds_databases.KINDS,
    *kinds_tokens.KINDS,
    *kinds_clocks.KINDS,
    *kinds_listeners.KINDS,
    *kinds_stores.KINDS,
)
FIRST_START_S = 60.0  # timeout for the first start of the daemon
READY_S = 15.0  # limit from the end of all faults until the daemon can commit
STALLED_S = 15.0  # a device is stuck if none of its queued heartbeats is acknowledged within this time
DRAIN_S = 600.0  # limit until all queues are empty; takes 1 to 5 s on an otherwise idle machine
NIGHTLY_RUN_S = 30.0  # limit for a nightly run after the end of all faults
POLL_S = 0.02
_ARCHIVING_KINDS = (DAYS_ARCHIVED, FAULTY_STORE, kinds_resources.SPOOL_FULL, kinds_stores.MARKER_MISSING)
_SETTLED = ("hb_writes_total", "hb_dedupe_total", "nexhb_heartbeats_refused_total", "nexhb_heartbeats_failed_total")


@dataclass
class Outcome:
    """The outcome of one seed."""

    seed: int
    seconds: float = 0.0  # of faults
    injected: list[InjectedFault] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[Event] = field(default_factory=Counter)
    ready_s: float = 0.0
    drained_s: float = 0.0
    starts: int = 0  # of daemons
    ended_by_itself: list[int] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Return the number of violations with this verdict."""
        return sum(violation.verdict == verdict for violation in self.violations)


def possible(world: World, kinds: Sequence[FaultKind]) -> list[FaultKind]:
    """Return the kinds that are possible in this world."""
    cluster = world.cluster
    return [
        kind
        for kind in kinds
        if (cluster is not None or not kind.own_cluster)
        and (not kind.small_disk or (cluster and cluster.small_disk))
        and (not kind.own_clock or faketime.library())
    ]


async def live(world: World, seconds: float, kinds: Sequence[FaultKind] = KINDS) -> Outcome:
    """Run the seed with `seconds` of faults, and return the outcome."""
    outcome = Outcome(world.seed)
    if not await begin(world, outcome):
        return outcome
    began = time.monotonic()
    outcome.injected = await inject(world, schedule(world.seed, possible(world, kinds), seconds))
    outcome.seconds = time.monotonic() - began
    await conclude(world, outcome, logs.QUIET_S)
    return outcome


async def begin(world: World, outcome: Outcome) -> bool:
    """Return whether the daemon becomes ready after its first start."""
    if await world.daemons[0].ready(FIRST_START_S) is None:
        _stuck(outcome, f"the daemon was not ready within {FIRST_START_S:.0f} s of its first start")
        return False
    return True


async def conclude(world: World, outcome: Outcome, quiet_s: float) -> None:
    """Complete the run: end all faults, let the devices drain their queues, wait for `quiet_s` seconds, in which no
    warning may repeat in the logs, then read and check everything."""
    outcome.violations += fault_violations(world)
    await _end_faults(world, outcome)
    ended_at = datetime.now(UTC)
    if not outcome.violations:
        if world.allowed_losses:
            await kinds_databases.accept(world)
        await world.managed_devices.settle()
        await asyncio.sleep(quiet_s)
        await _counters(world, outcome)
    outcome.violations += wrong_responses(world)
    quiet = ended_at, datetime.now(UTC)
    for daemon in world.daemons:
        code = await daemon.stop(signal.SIGTERM)
        if code != 0:
            _stuck(outcome, f"the daemon ended with exit code {code} after SIGTERM")
    if any(injected.fault.kind.name in _ARCHIVING_KINDS for injected in outcome.injected):
        code = await archive_days(world, NIGHTLY_RUN_S, **world.s3.reading)
        if code != 0:
            _stuck(outcome, f"a nightly run after the end of all faults ended with exit code {code}")
    outcome.violations += await check(world)
    outcome.violations += await asyncio.to_thread(log_violations, world, quiet)
    outcome.counts = world.journal.counts
    outcome.starts = sum(daemon.starts for daemon in world.daemons)
    outcome.ended_by_itself = [code for daemon in world.daemons for code in daemon.ended_by_itself]


def fault_violations(world: World) -> list[Violation]:
    """Return the violations that faults have detected."""
    return [Violation(verdict, -1, None, reason) for verdict, reason in world.violations_of_faults]


def wrong_responses(world: World) -> list[Violation]:
    """Return a violation for each response that was wrong for its token."""
    return [Violation("wrong", device, None, reason) for device, reason in world.managed_devices.violations]


def log_violations(world: World, quiet: tuple[datetime, datetime]) -> list[Violation]:
    """Return a violation for each log entry that no fault explains. No fault was in progress in the interval
    `quiet`."""
    entries = logs.read_files(path for daemon in world.daemons for path in daemon.logs)
    reasons = [*logs.unexpected(entries), *logs.repeating(entries, *quiet)]
    ends = sum(len(daemon.ended_by_itself) for daemon in world.daemons)
    if ends > (logged := sum(entry.event == "daemon.not_started" for entry in entries)):
        reasons.append(f"a daemon ended by itself {ends} times, and logged the reason {logged} times")
    return [Violation("unexpected", -1, None, reason) for reason in reasons]


def _stuck(outcome: Outcome, reason: str) -> Outcome:
    outcome.violations.append(Violation("stuck", -1, None, reason))
    return outcome


async def _end_faults(world: World, outcome: Outcome) -> None:
    """End all faults. Everything must then recover by itself, within the time limits."""
    for relay in (world.front, *world.proxies):
        relay.end_faults()
    if world.cluster is not None:
        await until_up(world.cluster, FIRST_START_S)
    for kiosk in world.kiosks:
        kiosk.stop_making()
    ready_s = await world.daemons[0].ready(READY_S)
    if ready_s is None:
        _stuck(outcome, f"the daemon was not ready within {READY_S:.0f} s after the end of all faults")
        return
    outcome.ready_s = ready_s
    began = time.monotonic()
    if not await _drained(world, began):
        unsent = {kiosk.number: kiosk.unsent for kiosk in world.kiosks if not kiosk.is_empty}
        _stuck(
            outcome,
            f"{time.monotonic() - began:.0f} s after the end of all faults, devices still have to send: {unsent}",
        )
    outcome.drained_s = time.monotonic() - began


async def _drained(world: World, began: float) -> bool:
    """Return whether all devices empty their queues, with less than STALLED_S between two acknowledgements of a
    device."""
    progress = dict.fromkeys(
        range(len(world.kiosks)), (0, began)
    )  # acknowledged so far, and when that number last grew
    while left := [kiosk for kiosk in world.kiosks if not kiosk.is_empty]:
        now = time.monotonic()
        for kiosk in left:
            if kiosk.acknowledged > progress[kiosk.number][0]:
                progress[kiosk.number] = (kiosk.acknowledged, now)
            if now - progress[kiosk.number][1] > STALLED_S or now - began > DRAIN_S:
                return False
        await asyncio.sleep(POLL_S)
    return True


async def _counters(world: World, outcome: Outcome) -> None:
    """Check the counters of the daemon that runs at the end: received equals settled plus unanswered."""
    metrics = await world.daemons[0].metrics()
    received, unanswered = metrics["heartbeats_ingested_total"], metrics["nexhb_intake_items"]
    settled = {name: metrics.get(name, 0.0) for name in _SETTLED}
    if received != sum(settled.values()) + unanswered:
        sums = f"{received:.0f} received, but {settled} and {unanswered:.0f} unanswered"
        outcome.violations.append(Violation("wrong", -1, None, f"the counters do not add up: {sums}"))
