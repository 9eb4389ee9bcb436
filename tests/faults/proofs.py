"""Proofs that the check can fail. A proof is a broken variant of nexhb, the faults that reveal it, and the violation
that the check must then report. With the real nexhb, the same faults cause no violation.

A broken variant is checked after each fault, while the devices keep sending: an acknowledged heartbeat has to be in the
database at once. The run ends as soon as the variant is caught.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count

from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.check import Violation, check
from tests.faults.nemesis import FaultKind, InjectedFault, inject, single_fault
from tests.faults.run import KINDS, Outcome, begin, conclude, fault_violations, log_violations, wrong_responses
from tests.faults.world import World

_KINDS = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Proof:
    """One variant, the faults that reveal it, and the violation by which it is caught."""

    variant: str
    faults: tuple[str, ...]
    verdict: str
    text: str  # contained in the reason of the violation
    crashes: bool = False  # PostgreSQL may crash, so it must belong to the run
    small_disk: bool = False  # requires a small disk of its own, which only root can mount
    own_clock: bool = False  # requires libfaketime, which gives PostgreSQL a clock of its own
    quiet_s: float = 0.0  # how long no fault occurs before the logs are read, for errors that only the log shows
    without_key: bool = False  # drop the history's unique index, which would prevent a second row

    @property
    def kinds(self) -> list[FaultKind]:
        """Return the kinds of the proof's faults."""
        return [_KINDS[name] for name in self.faults]


CAUGHT_WITHIN_S = 150.0  # on a busy machine, not every fault occurs while the writer works
MAX_ATTEMPTS = 4  # attempts to inject a fault that is not possible at once
POLL_S = 0.1
_NOT_STORED = "acknowledged, but not stored"
_TOKENS = ("token rotated", "device revoked", "device readmitted", "device added")
PROOFS = (
    Proof("answers-before-commit", ("daemon killed during a transaction",), "lost", _NOT_STORED),
    # The unique index prevents a second row, but the device still receives the wrong verdict.
    Proof(
        "retries-commit-blindly",
        ("response to COMMIT lost",),
        "wrong",
        "acknowledged as a duplicate at its first attempt",
    ),
    Proof("retries-commit-blindly", ("response to COMMIT lost",), "doubled", "2 rows", without_key=True),
    Proof("believes-the-number", ("postmaster killed at COMMIT",), "lost", _NOT_STORED, crashes=True),
    Proof(
        "drops-a-failed-batch",
        ("backend terminated during a transaction", "connections to the database cut"),
        "lost",
        _NOT_STORED,
    ),
    # No fault is needed: devices send the heartbeats that they held back after newer ones.
    Proof("status-moves-back", ("connections of devices cut",), "wrong", "its last status is"),
    Proof("keeps-the-first-facts", ("connections of devices cut",), "wrong", "stored facts"),
    Proof("stumbles-in-doubt", ("response to COMMIT lost",), "unexpected", "batch.failed_unexpectedly"),
    Proof(
        "never-listens-again",
        ("connections to the database cut",),
        "unexpected",
        "without a fault",
        quiet_s=3.0,
    ),
    Proof("drops-a-failed-batch", ("inodes run out",), "lost", _NOT_STORED, crashes=True, small_disk=True),
    Proof("drops-a-failed-batch", ("open files run out", "memory runs out"), "lost", _NOT_STORED),
    Proof("dies-of-its-log", ("log disk full",), "stuck", "exits repeatedly", crashes=True),
    Proof("goes-on-without-an-archive", ("spool disk full",), "lost", _NOT_STORED, crashes=True, small_disk=True),
    Proof("believes-the-store", ("faulty archive store",), "wrong", "an archive cannot be read", crashes=True),
    Proof("keeps-its-memory", ("database replaced by an older copy",), "lost", _NOT_STORED, crashes=True),
    Proof(
        "turns-away-the-forgotten",
        ("lagging standby promoted", *_TOKENS),
        "wrong",
        "a forgotten token received 401",
        crashes=True,
    ),
    Proof("believes-a-warning", ("synchronous standby killed and promoted",), "lost", _NOT_STORED, crashes=True),
    # The fault "device readmitted" is left out, since a device has to stay revoked for longer than the limit.
    Proof("keeps-the-revoked", ("device revoked", "token rotated"), "wrong", "a revoked token received 200"),
    Proof("turns-away-the-new", _TOKENS, "wrong", "a good token received 401"),
    Proof(
        "keeps-the-first-time",
        ("database's clock stepped",),
        "wrong",
        "after a step of the database's clock",
        crashes=True,
        own_clock=True,
    ),
    Proof("trusts-its-listener", ("listener's connection stalled",), "wrong", "a revoked token received 200"),
    Proof("trusts-any-store", ("archive marker missing",), "wrong", "without its marker"),
    Proof("dies-of-a-cancel", ("all statements cancelled",), "unexpected", "daemon.part_died"),
    Proof("forgets-at-the-stop", ("daemon stopped during a transaction",), "lost", _NOT_STORED),
)


async def is_caught(world: World, proof: Proof) -> bool:
    """Return whether the proof's faults, repeated, reveal the broken variant that runs in this world."""
    until = time.monotonic() + CAUGHT_WITHIN_S
    await _start(world, Outcome(world.seed), without_key=proof.without_key)
    for number in count():
        for kind in proof.kinds:
            await inject(world, single_fault(kind, number))
            if any(
                violation.verdict == proof.verdict and proof.text in violation.reason
                for violation in await _violations(world, proof)
            ):
                return True
        if time.monotonic() > until:
            break
    return False


async def _violations(world: World, proof: Proof) -> list[Violation]:
    """Return the violations so far, between two faults."""
    since = datetime.now(UTC)
    await asyncio.sleep(proof.quiet_s)
    violations = [*fault_violations(world), *wrong_responses(world), *log_violations(world, (since, datetime.now(UTC)))]
    while True:
        with suppress(*UNREACHABLE, TimeoutError):  # the database is still recovering from the fault
            return violations + await check(world)
        await asyncio.sleep(POLL_S)


async def run_proofs(world: World, proofs: Sequence[Proof]) -> Outcome:
    """Inject the faults of all these proofs, one after the other, and return the outcome."""
    outcome = Outcome(world.seed)
    if await _start(world, outcome, without_key=any(proof.without_key for proof in proofs)):
        for kind in dict.fromkeys(kind for proof in proofs for kind in proof.kinds):
            outcome.injected += await _inject_once(world, kind)
        await conclude(world, outcome, max(proof.quiet_s for proof in proofs))
    return outcome


async def _inject_once(world: World, kind: FaultKind) -> list[InjectedFault]:
    injected: list[InjectedFault] = []
    for number in range(MAX_ATTEMPTS):
        injected += await inject(world, single_fault(kind, number))
        if not injected[-1].failed:
            break
    return injected


async def _start(world: World, outcome: Outcome, *, without_key: bool) -> bool:
    if not await begin(world, outcome):
        return False
    if without_key:
        async with world.connection() as conn:
            for name in await conn.fetch(_KEYS):
                await conn.execute(f"DROP INDEX {name[0]}")
    return True


_KEYS = (
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indexrelid::regclass::text ~ '^device_heartbeats_.*_key$'"
)
