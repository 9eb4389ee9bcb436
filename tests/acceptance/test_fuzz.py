"""A few thousand of the million malformed bodies of `make fuzz`."""

from __future__ import annotations

import random
from datetime import UTC, datetime

from tests.conftest import example
from tests.fuzz.bodies import NASTY, malformed
from tests.fuzz.run import daemon, fuzz


async def test_malformed_bodies_are_refused_or_taken_and_never_an_error_of_ours() -> None:
    with daemon() as target:
        result = await fuzz(target, 4_000, seed=7, progress=lambda _: None)
    assert result.broken == []
    assert sum(result.statuses.values()) + result.cut == 4_000
    assert result.statuses[200] > 50  # some are still heartbeats
    assert result.statuses[400] > 500
    assert result.statuses[422] > 500
    assert result.cut == 0


def test_the_same_seed_makes_the_same_bodies_and_they_are_of_many_kinds() -> None:
    def some(seed: int) -> list[bytes]:
        chance = random.Random(seed)  # noqa: S311
        return [malformed(example(datetime(2026, 11, 24, tzinfo=UTC)), chance) for _ in range(2_000)]

    assert some(1) == some(1) != some(2)
    assert len(set(some(1))) > 1_900
    joined = b"".join(some(1))
    assert all(nasty in joined for nasty in NASTY if len(nasty) < 40)
