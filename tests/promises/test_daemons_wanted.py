"""`nexhb:daemons_wanted` of the rules and the formula on the fleet's curve say the same of the same daemons."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import yaml

from bench.curve.wanted import Signals, daemons_wanted
from bench.scrape import parse
from nexhb.metrics import _WAITS, queue_wait
from tests.promises.test_alerts import FOLDER, needs_promtool, promtool

BATCH_MAX = 2_000
MINUTES = 6  # one more than the rates look back
# (daemons, cores of all)
LOADS = [(1, 0.05), (1, 0.29), (1, 0.31), (1, 0.59), (1, 0.61), (1, 0.95), (3, 0.5), (3, 1.0), (3, 1.9), (3, 2.5)]
# Upper bounds of the bucket that every wait and every lag lies in, or none, and heartbeats a batch: on either side of
# the limits of 0.2 s, 0.1 s and nine tenths of ingest.batch_max, one at a time.
CASES: list[tuple[float | None, float | None, int]] = [
    (None, None, 1), (0.2, 0.1, 1_780), (0.5, None, 1), (0.01, 0.2, 1), (0.01, 0.01, 1_820), (10, 10, 2_000),
]  # fmt: skip


def buckets(name: str, bound: float | None, instance: str) -> list[dict[str, str]]:
    """A histogram all of whose observations, a second's worth each second, lie in one bucket."""
    if bound is None:
        return []
    return [
        {
            "series": f'{name}_bucket{{instance="{instance}", job="nexhb", le="{le}"}}',
            "values": f"0+{60 if le >= bound else 0}x{MINUTES}",
        }
        for le in (*map(float, _WAITS), float("inf"))
    ]


def quantile(bound: float | None) -> float | None:
    """Its p99 as bench estimates it."""
    if bound is None:
        return None
    lines = "".join(f'a_bucket{{le="{le}"}} {60 if le >= bound else 0}\n' for le in (*_WAITS, float("inf")))
    return parse(f"# TYPE a histogram\n{lines}").quantile("a", 0.99)


def series(daemons: int, cores: float, wait: float | None, lag: float | None, batch: int) -> list[dict[str, str]]:
    """What so many daemons export; the first of them is the slow one."""
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
def test_the_rule_and_the_formula_of_the_curve_say_the_same(tmp_path: Path) -> None:
    tests: list[dict[str, Any]] = []
    said = set()
    for (daemons, cores), (wait, lag, batch) in product(LOADS, CASES):
        wanted = daemons_wanted(Signals(daemons, cores, quantile(wait), quantile(lag), batch / BATCH_MAX))
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
