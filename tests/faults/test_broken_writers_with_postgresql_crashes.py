"""The fault machine catches each broken writer whose faults may crash PostgreSQL, so that the run needs a PostgreSQL of
its own."""

from __future__ import annotations

from pathlib import Path

from tests.faults.proofs import Proof
from tests.faults.proving import is_caught, proofs


@proofs(crashes=True)
async def test_a_broken_writer_is_caught(proof: Proof, cluster: str, template: Path) -> None:
    assert await is_caught(proof, cluster, template)
