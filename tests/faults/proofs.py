"""For each broken writer the faults that reveal it, and what the check must then say. The real writer lives through the
same faults, and nothing is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.nemesis import Kind
from tests.faults.run import KINDS, Outcome, live
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
    quiet_s: float = 0.0  # for what shows only in what is logged behind the healing
    keyless: bool = False  # the key of the rows is taken away: it would hide what the writer does


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
    Proof("keeps-the-revoked", _TOKENS, "wrong", "a token that is revoked hears 200"),
    Proof("turns-away-the-new", _TOKENS, "wrong", "a good token heard 401"),
    Proof("dies-of-a-cancel", ("each session cancelled",), "unexpected", "daemon.part_died"),
    Proof("forgets-at-the-stop", ("daemon stopped in mid-transaction",), "lost", _NOT_THERE),
)


def kinds_of(proof: Proof) -> Sequence[Kind]:
    """Its faults."""
    return [_KINDS[name] for name in proof.faults]


async def undergo(world: World, proof: Proof, seconds: float) -> Outcome:
    """Live through the proof's faults."""
    if proof.keyless:
        await world.daemons[0].ready(60.0)
        async with world.connection() as conn:
            for name in await conn.fetch(_KEYS):
                await conn.execute(f"DROP INDEX {name[0]}")
    return await live(world, seconds, kinds_of(proof), proof.quiet_s)


_KEYS = (
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indexrelid::regclass::text ~ '^device_heartbeats_.*_key$'"
)
