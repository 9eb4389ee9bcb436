"""The machine finds what it is there to find: each broken writer is caught, and the real one lives through the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import product
from pathlib import Path

import asyncpg
import pytest

from tests.conftest import TEMPLATE, dsn_of
from tests.faults import faketime
from tests.faults.cluster import running, stopped
from tests.faults.devices import Habits
from tests.faults.guard import Guard, guarding
from tests.faults.proofs import PROOFS, Proof, caught, lived
from tests.faults.variants import VARIANTS
from tests.faults.world import REAL, World, living

DEVICES = 16
AT_ONCE = {False: 20, True: 3}  # proofs that one real writer lives through: whether PostgreSQL crashes → how many
UNHURRIED = Habits(every_s=0.3)  # what piles up in front of the real writer has to be drained
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


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A cluster to be copied."""
    with asyncio.Runner() as runner, guarding() as guard:
        context = stopped(guard)
        yield runner.run(context.__aenter__())


@asynccontextmanager
async def a_world(
    cluster: str, template: Path, guard: Guard, proof: Proof, command: tuple[str, ...], habits: Habits | None = None
) -> AsyncIterator[World]:
    """The world of a proof, with its kind of database and that writer."""
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(running(guard, template)) if proof.crashes else None
        dsn = own.dsn if own else await stack.enter_async_context(scratch(cluster, "faults"))
        yield await stack.enter_async_context(living(guard, dsn, seed=1, devices=DEVICES, cluster=own, command=command))


POSSIBLE = [
    proof for proof in PROOFS if (not proof.root or os.geteuid() == 0) and (not proof.own_clock or faketime.library())
]


@pytest.mark.parametrize(
    "proof", POSSIBLE, ids=lambda proof: f"{proof.variant} is {proof.caught_as}: {', '.join(proof.faults)}"
)
async def test_a_broken_writer_is_caught(cluster: str, template: Path, proof: Proof) -> None:
    with guarding() as guard:
        async with a_world(cluster, template, guard, proof, (*_BROKEN, proof.variant)) as world:
            assert await caught(world, proof)


def alike() -> Iterator[list[Proof]]:
    """Proofs that want the same kind of database; few enough of them for a real writer to live through in a minute."""
    for crashes, keyless in product((False, True), repeat=2):
        those = [proof for proof in POSSIBLE if (proof.crashes, proof.keyless) == (crashes, keyless)]
        for first in range(0, len(those), AT_ONCE[crashes]):
            yield those[first : first + AT_ONCE[crashes]]


@pytest.mark.parametrize("proofs", list(alike()), ids=lambda proofs: ", ".join(proof.variant for proof in proofs))
async def test_the_real_writer_passes_through_the_same_faults(
    cluster: str, template: Path, proofs: list[Proof]
) -> None:
    with guarding() as guard:
        async with a_world(cluster, template, guard, proofs[0], REAL, UNHURRIED) as world:
            outcome = await lived(world, proofs)
    assert [str(one) for one in outcome.violations] == []
    carried_out = {one.fault.kind.name for one in outcome.struck if not one.failed}
    assert carried_out == {name for proof in proofs for name in proof.faults}


def test_every_variant_has_its_proof() -> None:
    assert {proof.variant for proof in PROOFS} == set(VARIANTS)
