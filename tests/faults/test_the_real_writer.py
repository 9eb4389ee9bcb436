"""With the real writer, the faults of all proofs cause no violation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.faults.devices import Habits
from tests.faults.guard import guarding
from tests.faults.proofs import Proof, run_proofs
from tests.faults.proving import POSSIBLE, world_of
from tests.faults.world import REAL

PROOFS_PER_RUN = {False: 20, True: 3}  # key: whether PostgreSQL may crash
SLOW = Habits(every_s=0.3)  # slower than usual, because at the end the real writer has to drain all queues


def similar_proofs() -> Iterator[list[Proof]]:
    """Yield lists of proofs that require the same kind of database, each short enough for a run of a minute."""
    for crashes, without_key in product((False, True), repeat=2):
        similar = [proof for proof in POSSIBLE if (proof.crashes, proof.without_key) == (crashes, without_key)]
        for first in range(0, len(similar), PROOFS_PER_RUN[crashes]):
            yield similar[first : first + PROOFS_PER_RUN[crashes]]


@pytest.mark.parametrize(
    "proofs", list(similar_proofs()), ids=lambda proofs: ", ".join(proof.variant for proof in proofs)
)
async def test_the_same_faults_cause_no_violation_with_the_real_writer(
    cluster: str, template: Path, proofs: list[Proof]
) -> None:
    with guarding() as guard:
        async with world_of(proofs[0], cluster, template, guard, REAL, SLOW) as world:
            outcome = await run_proofs(world, proofs)
    assert [str(violation) for violation in outcome.violations] == []
    injected = {fault.fault.kind.name for fault in outcome.injected if not fault.failed}
    assert injected == {name for proof in proofs for name in proof.faults}
