"""Run the world of a proof (see proofs.py): sixteen devices, a broken variant or the real nexhb, and a database."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE, scratch
from tests.faults import faketime
from tests.faults import proofs as proofs_module
from tests.faults.cluster import running
from tests.faults.devices import Habits
from tests.faults.guard import Guard, guarding
from tests.faults.proofs import PROOFS, Proof
from tests.faults.world import World, living

DEVICES = 16
POSSIBLE = [
    proof
    for proof in PROOFS
    if (not proof.small_disk or os.geteuid() == 0) and (not proof.own_clock or faketime.library())
]


@asynccontextmanager
async def world_of(
    proof: Proof,
    cluster: str,
    template: Path,
    guard: Guard,
    entry: tuple[str, ...],
    habits: Habits | None = None,
) -> AsyncIterator[World]:
    """Run a world with the kind of database that the proof requires, and the daemon that `entry` starts."""
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(running(guard, template)) if proof.crashes else None
        dsn = own.dsn if own else (await stack.enter_async_context(scratch(cluster, TEMPLATE))).dsn
        world = living(guard, dsn, seed=1, devices=DEVICES, cluster=own, entry=entry, habits=habits)
        yield await stack.enter_async_context(world)


def proofs(*, crashes: bool) -> pytest.MarkDecorator:
    """Parametrize a test with the proofs in which PostgreSQL may crash, or with all others."""
    return pytest.mark.parametrize(
        "proof",
        [proof for proof in POSSIBLE if proof.crashes == crashes],
        ids=lambda proof: f"{proof.variant} is {proof.verdict}: {', '.join(proof.faults)}",
    )


async def is_caught(proof: Proof, cluster: str, template: Path) -> bool:
    """Return whether the proof's broken variant is caught."""
    with guarding() as guard:
        async with world_of(proof, cluster, template, guard, ("tests.faults.variants", proof.variant)) as world:
            return await proofs_module.is_caught(world, proof)
