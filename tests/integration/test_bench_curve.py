"""The fleet's curve on real daemons, as short as it can be: every row found, every figure there."""

from __future__ import annotations

from dataclasses import replace

from bench.curve import run
from bench.scenarios import CURVE


def test_a_curve_measures_a_fleet_and_the_ceiling_and_finds_every_row() -> None:
    plan = replace(
        CURVE, fleets=(400,), interval_s=4, settle_s=0.3, window_s=1.0, connections=8, first_connections=8,
        ceiling_devices=20, ceiling_connections=4,
    )  # fmt: skip
    told: list[str] = []
    outcome = run.run(plan, {}, told.append)
    assert told == ["400 devices", "the ceiling"]
    assert [trial.check.ok for trial in outcome.trials] == [True, True]
    (fleet,) = outcome.curve.paces
    # each once beforehand, and what was sent at the rate
    assert fleet.heard == 400
    assert 400 < fleet.rows <= 400 + 130  # a busy machine sends less in its time
    for point in outcome.curve.points:
        assert point.sent_per_s > 0
        assert point.latency.p99_ms is not None
        assert point.memory.known_mb > 0
        assert point.row_bytes > 50
        assert point.wal_bytes > 50
        assert point.batch_mean is not None
        assert point.batch_mean >= 1
        assert point.wanted >= 1
