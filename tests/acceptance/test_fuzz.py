"""A few thousand of the million malformed bodies of `make fuzz`."""

from __future__ import annotations

import random
from datetime import UTC, datetime

from tests.conftest import example
from tests.fuzz.bodies import HOSTILE_VALUES, malformed
from tests.fuzz.run import daemon, fuzz


async def test_malformed_bodies_cause_no_error_of_the_server() -> None:
    with daemon() as target:
        result = await fuzz(target, 4_000, seed=7, progress=lambda _: None)
    assert result.violations == []
    assert sum(result.statuses.values()) + result.closed == 4_000
    assert result.statuses[200] > 50  # some bodies are still valid heartbeats
    assert result.statuses[400] > 500
    assert result.statuses[422] > 500
    assert result.closed == 0


def test_the_same_seed_produces_the_same_bodies_with_many_kinds_of_errors() -> None:
    def bodies(seed: int) -> list[bytes]:
        chance = random.Random(seed)  # noqa: S311
        return [malformed(example(datetime(2026, 11, 24, tzinfo=UTC)), chance) for _ in range(2_000)]

    assert bodies(1) == bodies(1) != bodies(2)
    assert len(set(bodies(1))) > 1_900
    joined = b"".join(bodies(1))
    assert all(value in joined for value in HOSTILE_VALUES if len(value) < 40)
