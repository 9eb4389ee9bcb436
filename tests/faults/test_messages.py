"""Run a few kills during deliveries; `make kills` runs 200."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.messages.kills import LANES, RECEIVER, SERVER
from tests.faults.messages.run import Outcome, Plan, run
from tests.faults.messages.variants import REAL, VARIANTS

# What reveals a variant: the lanes of kills, and the first word of the violation.
REVEALED_BY = {
    "records-before-it-sends": ([SERVER], "lost"),
    "gives-a-retry-a-new-id": ([RECEIVER], "doubled"),
    "claims-without-order": ([RECEIVER], "order"),
    "forgets-what-failed": ([RECEIVER], "lost"),
    "says-nothing-about-itself": ([RECEIVER], "lost"),
}


async def short_run(template: Path, variant: str = REAL, lanes: Sequence[str] = LANES) -> Outcome:
    """Kill five times, with times that are scaled down."""
    plan = Plan(seed=1, kills=5, batteries=10, told_after_s=2.0, variant=variant, lanes=lanes)
    return await run(plan, template=template)


async def test_every_message_arrives_with_one_id_and_in_order_during_kills(template: Path) -> None:
    outcome = await short_run(template)
    assert outcome.violations == []
    assert sum(outcome.kills.values()) == 5
    assert outcome.messages > 20


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_broken_delivery_is_caught(template: Path, variant: str) -> None:
    lanes, verdict = REVEALED_BY[variant]
    outcome = await short_run(template, variant, lanes)
    assert any(violation.startswith(verdict) for violation in outcome.violations)


def test_every_variant_is_revealed() -> None:
    assert REVEALED_BY.keys() == VARIANTS.keys()
