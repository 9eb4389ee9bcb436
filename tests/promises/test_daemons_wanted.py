"""The rule `nexhb:daemons_wanted` computes the formula of docs/runbook.md, "NexhbDaemonsWanted"."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from nexhb.metrics import _WAITS, queue_wait
from tests.support.rules import FOLDER, needs_promtool, promtool

BATCH_MAX = 2_000
MINUTES = 6  # one minute more than the range of the rates
# (daemons, CPU cores that they use together)
LOADS = [(1, 0.05), (1, 0.29), (1, 0.31), (1, 0.59), (1, 0.61), (1, 0.95), (3, 0.5), (3, 1.0), (3, 1.9), (3, 2.5)]
# Each case has the upper bound of the bucket that contains all waits, the same for all lags (None: no observations),
# and the heartbeats per batch. The
# cases lie on either side of the limits of 0.2 s, 0.1 s and nine tenths of ingest.batch_max, one limit at a time.
CASES: list[tuple[float | None, float | None, int]] = [
    (None, None, 1), (0.2, 0.1, 1_780), (0.5, None, 1), (0.01, 0.2, 1), (0.01, 0.01, 1_820), (10, 10, 2_000),
]  # fmt: skip


def buckets(name: str, bound: float | None, instance: str) -> list[dict[str, str]]:
    """Return a histogram with all observations in one bucket, one per second."""
    if bound is None:
        return []
    return [
        {
            "series": f'{name}_bucket{{instance="{instance}", job="nexhb", le="{le}"}}',
            "values": f"0+{60 if le >= bound else 0}x{MINUTES}",
        }
        for le in (*map(float, _WAITS), float("inf"))
    ]


def p99_s(bound: float | None) -> float:
    """Return the p99 of observations that are all in the bucket below a bound, as histogram_quantile estimates it."""
    if bound is None:
        return 0.0
    low = max((le for le in map(float, _WAITS) if le < bound), default=0.0)
    return low + 0.99 * (bound - low)


def daemons_wanted(daemons: int, cores: float, wait: float | None, lag: float | None, batch_filled: float) -> int:
    """Return the number of daemons that the CPU requires. If heartbeats wait although the CPU suffices, return at least
    one daemon more than now run, unless the daemons use so little CPU that they must be waiting for PostgreSQL."""
    by_cpu = max(1, math.ceil(cores / 0.6))
    slow = p99_s(wait) > 0.2 or p99_s(lag) > 0.1 or batch_filled > 0.9
    return max(by_cpu, daemons + 1) if slow and cores / daemons > 0.3 else by_cpu


def series(daemons: int, cores: float, wait: float | None, lag: float | None, batch: int) -> list[dict[str, str]]:
    """Return the metrics of this many daemons, the first of which is slow."""
    found: list[dict[str, str]] = []
    for number in range(daemons):
        at = f'instance="kiosks:{9100 + number}", job="nexhb"'
        rows = batch if number == 0 else 1
        found += [
            {"series": f"up{{{at}}}", "values": f"1x{MINUTES}"},
            {"series": f"process_cpu_seconds_total{{{at}}}", "values": f"0+{60 * cores / daemons:.6f}x{MINUTES}"},
            {"series": f"nexhb_batch_heartbeats_sum{{{at}}}", "values": f"0+{60 * rows}x{MINUTES}"},
            {"series": f"nexhb_batch_heartbeats_count{{{at}}}", "values": f"0+60x{MINUTES}"},
            {"series": f"nexhb_batch_limit_heartbeats{{{at}}}", "values": f"{BATCH_MAX}x{MINUTES}"},
        ]
        slow = number == 0
        for name, bound in (("nexhb_queue_wait_seconds", wait), ("nexhb_loop_lag_seconds", lag)):
            found += buckets(name, bound if slow else bound and 0.001, f"kiosks:{9100 + number}")
    return found


@needs_promtool
def test_the_rule_and_the_formula_of_the_runbook_say_the_same(tmp_path: Path) -> None:
    tests: list[dict[str, Any]] = []
    said = set()
    for (daemons, cores), (wait, lag, batch) in product(LOADS, CASES):
        wanted = daemons_wanted(daemons, cores, wait, lag, batch / BATCH_MAX)
        said.add((daemons, wanted))
        sample = {"labels": "nexhb:daemons_wanted", "value": wanted}
        asked = {"expr": "nexhb:daemons_wanted", "eval_time": f"{MINUTES}m", "exp_samples": [sample]}
        tests.append(
            {
                "name": f"{daemons} daemons, {cores} cores, waits {wait}, lags {lag}, batches of {batch}",
                "interval": "1m",
                "input_series": series(daemons, cores, wait, lag, batch),
                "promql_expr_test": [asked],
            }
        )
    # cases on both sides of every limit
    assert {(1, 1), (1, 2), (3, 1), (3, 2), (3, 4), (3, 5)} <= said
    file = tmp_path / "daemons_wanted.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FOLDER / "nexhb.rules.yml")], "tests": tests}))
    promtool("test", "rules", file)


def test_the_bounds_of_the_histograms_have_the_limits_among_them() -> None:
    assert {0.1, 0.2} <= set(_WAITS)
    assert queue_wait._upper_bounds[:-1] == [float(bound) for bound in _WAITS]
