"""The fault machine catches each broken writer whose faults do not crash PostgreSQL."""

from __future__ import annotations

from pathlib import Path

from tests.faults.proofs import PROOFS, Proof
from tests.faults.proving import is_caught, proofs
from tests.faults.variants import VARIANTS


@proofs(crashes=False)
async def test_a_broken_writer_is_caught(proof: Proof, cluster: str, template: Path) -> None:
    assert await is_caught(proof, cluster, template)


def test_every_variant_has_its_proof() -> None:
    assert {proof.variant for proof in PROOFS} == set(VARIANTS)
