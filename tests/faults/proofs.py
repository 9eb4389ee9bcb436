"""For each broken writer the faults that reveal it, and what the check must then say. The real writer lives through the
same faults, and nothing is said.

A broken writer is looked at behind each fault, while devices go on: what was acknowledged has to be there at once. Its
life ends when it is caught.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count

from tests.faults.check import Violation, check
from tests.faults.nemesis import Kind, Struck, once, unleash
from tests.faults.run import KINDS, Outcome, begin, blamed, conclude, logged, misheard
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

_KINDS = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Proof:
    """One variant, and how it is caught."""

    variant: str
    faults: tuple[str, ...]
    caught_as: str
    saying: str
    crashes: bool = False  # PostgreSQL does, so that it must be the run's own
    root: bool = False  # it wants a small disk of its own
    own_clock: bool = False  # PostgreSQL's
    quiet_s: float = 0.0  # for what shows only in what is logged behind the healing
    keyless: bool = False  # the key of the rows is taken away: it would hide what the writer does

    @property
    def kinds(self) -> list[Kind]:
        """Its faults."""
        return [_KINDS[name] for name in self.faults]


CAUGHT_WITHIN_S = 150.0  # on a busy machine not every fault finds the writer at work
CARRIED_OUT_WITHIN = 4  # attempts
LOOK_S = 0.1
_NOT_THERE = "acknowledged, and not there"
_TOKENS = ("token rotated", "device revoked", "device readmitted", "device made known")
PROOFS = (
    Proof("answers-before-commit", ("daemon killed in mid-transaction",), "lost", _NOT_THERE),
    # With the key the rows are right whatever the writer does; what it says of them is not.
    Proof("retries-commit-blindly", ("COMMIT's answer swallowed",), "wrong", "called a duplicate at its first attempt"),
    Proof("retries-commit-blindly", ("COMMIT's answer swallowed",), "doubled", "2 rows", keyless=True),
    Proof("believes-the-number", ("postmaster killed at a COMMIT",), "lost", _NOT_THERE, crashes=True),
    Proof("drops-a-failed-batch", ("backend terminated in mid-transaction", "database line cut"), "lost", _NOT_THERE),
    # No fault is needed: devices send behind newer ones what they held back.
    Proof("status-moves-back", ("devices' line cut",), "wrong", "its last status is"),
    Proof("keeps-the-first-facts", ("devices' line cut",), "wrong", "of itself it said"),
    Proof("stumbles-in-doubt", ("COMMIT's answer swallowed",), "unexpected", "batch.failed_unexpectedly"),
    Proof("never-listens-again", ("database line cut",), "unexpected", "in which nothing is broken", quiet_s=3.0),
    Proof("drops-a-failed-batch", ("inodes run out",), "lost", _NOT_THERE, crashes=True, root=True),
    Proof("drops-a-failed-batch", ("open files run out", "memory runs out"), "lost", _NOT_THERE),
    Proof("dies-of-its-log", ("log full",), "stuck", "ends again and again", crashes=True),
    Proof("goes-on-without-an-archive", ("spool full",), "lost", _NOT_THERE, crashes=True, root=True),
    Proof("believes-the-store", ("hostile store",), "wrong", "an archive cannot be read", crashes=True),
    Proof("keeps-its-memory", ("swapped for an older copy",), "lost", _NOT_THERE, crashes=True),
    Proof(
        "turns-away-the-forgotten",
        ("lagging standby promoted", *_TOKENS),
        "wrong",
        "a forgotten token heard 401",
        crashes=True,
    ),
    Proof("believes-a-warning", ("synchronous standby dies and is promoted",), "lost", _NOT_THERE, crashes=True),
    # Not readmitted: it has to stay revoked for longer than the bound.
    Proof("keeps-the-revoked", ("device revoked", "token rotated"), "wrong", "a token that is revoked heard 200"),
    Proof("turns-away-the-new", _TOKENS, "wrong", "a good token heard 401"),
    Proof(
        "keeps-the-first-time",
        ("database's clock jumps",),
        "wrong",
        "clock jumped by",
        crashes=True,
        own_clock=True,
    ),
    Proof("trusts-its-listener", ("listener's line stalled",), "wrong", "a token that is revoked heard 200"),
    Proof("trusts-any-store", ("another store",), "wrong", "without its marker"),
    Proof("dies-of-a-cancel", ("each session cancelled",), "unexpected", "daemon.part_died"),
    Proof("forgets-at-the-stop", ("daemon stopped in mid-transaction",), "lost", _NOT_THERE),
)


async def caught(world: World, proof: Proof) -> bool:
    """Whether the proof's faults, again and again, reveal the broken writer that lives in this world."""
    until = time.monotonic() + CAUGHT_WITHIN_S
    await _begin(world, Outcome(world.seed), keyless=proof.keyless)
    for number in count():
        for kind in proof.kinds:
            await unleash(world, once(kind, number))
            if any(one.what == proof.caught_as and proof.saying in one.story for one in await _found(world, proof)):
                return True
        if time.monotonic() > until:
            break
    return False


async def _found(world: World, proof: Proof) -> list[Violation]:
    """What stands broken between two faults."""
    since = datetime.now(UTC)
    await asyncio.sleep(proof.quiet_s)
    said = [*blamed(world), *misheard(world), *logged(world, (since, datetime.now(UTC)))]
    while True:
        with suppress(*UNREACHABLE, TimeoutError):  # it recovers still from the fault
            return said + await check(world)
        await asyncio.sleep(LOOK_S)


async def lived(world: World, proofs: Sequence[Proof]) -> Outcome:
    """What comes of the faults of all these proofs, one after the other; each is carried out."""
    outcome = Outcome(world.seed)
    if await _begin(world, outcome, keyless=any(proof.keyless for proof in proofs)):
        for kind in dict.fromkeys(kind for proof in proofs for kind in proof.kinds):
            outcome.struck += await _carried_out(world, kind)
        await conclude(world, outcome, max(proof.quiet_s for proof in proofs))
    return outcome


async def _carried_out(world: World, kind: Kind) -> list[Struck]:
    struck: list[Struck] = []
    for number in range(CARRIED_OUT_WITHIN):
        struck += await unleash(world, once(kind, number))
        if not struck[-1].failed:
            break
    return struck


async def _begin(world: World, outcome: Outcome, *, keyless: bool) -> bool:
    if not await begin(world, outcome):
        return False
    if keyless:
        async with world.connection() as conn:
            for name in await conn.fetch(_KEYS):
                await conn.execute(f"DROP INDEX {name[0]}")
    return True


_KEYS = (
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indexrelid::regclass::text ~ '^device_heartbeats_.*_key$'"
)
