"""The machine finds what it is there to find: each broken writer is caught, and the real one lives through the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import pytest

from tests.conftest import TEMPLATE, dsn_of
from tests.faults.cluster import running
from tests.faults.guard import Guard, guarding
from tests.faults.proofs import PROOFS, Proof, undergo
from tests.faults.run import Outcome
from tests.faults.variants import VARIANTS
from tests.faults.world import REAL, living

SECONDS = 4.0
DEVICES = 24
_BROKEN = ("-m", "tests.faults.variants")


@asynccontextmanager
async def scratch(cluster: str, name: str) -> AsyncIterator[str]:
    """A database with the schema on the session's cluster; its DSN."""
    conn = await asyncpg.connect(cluster)
    try:
        await conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await conn.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield dsn_of(cluster, name)
        await conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await conn.close()


async def lived(
    cluster: str, guard: Guard, proof: Proof, name: str, command: tuple[str, ...], seconds: float
) -> Outcome:
    """What came of the proof's faults, for one writer."""
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(running(guard)) if proof.crashes else None
        dsn = own.dsn if own else await stack.enter_async_context(scratch(cluster, f"faults_{name}"))
        world = living(guard, dsn, seed=1, devices=DEVICES, cluster=own, command=command)
        return await undergo(await stack.enter_async_context(world), proof, seconds)


async def until_caught(cluster: str, guard: Guard, proof: Proof) -> bool:
    """Whether the broken writer is caught: on a busy machine a few seconds may hold no fault that finds it at work."""
    for seconds in (SECONDS, 2 * SECONDS, 4 * SECONDS):
        outcome = await lived(cluster, guard, proof, "broken", (*_BROKEN, proof.variant), seconds)
        if any(one.what == proof.caught_as and proof.saying in one.story for one in outcome.violations):
            return True
    return False


@pytest.mark.parametrize(
    "proof",
    [proof for proof in PROOFS if not proof.root or os.geteuid() == 0],
    ids=lambda proof: f"{proof.variant} is {proof.caught_as}: {', '.join(proof.faults)}",
)
async def test_a_broken_writer_is_caught_and_the_real_one_passes(cluster: str, proof: Proof) -> None:
    with guarding() as guard:
        broken, real = await asyncio.gather(
            until_caught(cluster, guard, proof), lived(cluster, guard, proof, "real", REAL, SECONDS)
        )
    assert [str(one) for one in real.violations] == []
    assert any(not one.failed for one in real.struck)
    assert broken


def test_every_variant_has_its_proof() -> None:
    assert {proof.variant for proof in PROOFS} == set(VARIANTS)
