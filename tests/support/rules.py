"""Read the rules for Prometheus and the metrics that the code declares, and run promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

FOLDER = Path(__file__).parents[2] / "packaging" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "nexhb.rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: the package prometheus)"
)


def promtool(*words: str | Path) -> str:
    """Run promtool, and return its output. An error fails the test."""
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def declared() -> dict[str, set[str]]:
    """Return the labels of every declared metric, by the names of its samples. A metric of rare events has no sample
    yet."""
    found: dict[str, set[str]] = {}
    for one in list(REGISTRY._collector_to_names):
        if isinstance(one, MetricWrapperBase):
            for family in one.describe():
                labels = set(one._labelnames)
                for suffix in ("", "_total", "_bucket", "_count", "_sum"):
                    found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found
