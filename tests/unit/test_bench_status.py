"""What is said of a large last status: verdicts, tables, the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compare.command import PAGE
from bench.compare.page import NOT_QUIET, between
from bench.micro.status import Grown, Size
from bench.report import Percentiles
from bench.scenarios import STATUS
from bench.status.found import BEGIN, END, PATHS, Found, List, section, verdicts

CALM = Percentiles(4.0, 6.0, 8.0, 9.0)
OFFLINE, DOWN = List(PATHS[0], 1_000, 275_000, CALM), List(PATHS[1], 420, 110_000, CALM)
GROWN = Grown(100_000, 60, 80.0, 75_000, 0.78, 12_000, Size(20.0, 4.0), Size(25.0, 5.0))
FOUND = Found((OFFLINE, DOWN), Percentiles(3.0, 5.0, 7.0, 8.0), 0.8, 5_000, 0, 0.04, (GROWN,))


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (replace(FOUND, lists=(OFFLINE._replace(latency=Percentiles(1, 10.1, 11, 12)), DOWN)), "p95 below 10 ms"),
        (replace(FOUND, lists=(OFFLINE, DOWN._replace(latency=Percentiles()))), "p95 below 10 ms"),
        (replace(FOUND, lists=(OFFLINE._replace(devices=999), DOWN)), "not in the list"),
        (replace(FOUND, lists=(OFFLINE._replace(devices=1_001), DOWN)), "not in the list"),
        (replace(FOUND, lists=(OFFLINE, DOWN._replace(devices=299))), "Unity down"),
        (replace(FOUND, growth=(GROWN, replace(GROWN, devices=2_000, hot_share=0.59))), "2,000 devices: HOT"),
        (replace(FOUND, lacking=1), "not acknowledged"),
    ],
)
def test_one_floor_is_broken_alone(worse: Found, name: str) -> None:
    assert all(verdict.ok for verdict in verdicts(STATUS, FOUND))
    (broken,) = (verdict for verdict in verdicts(STATUS, worse) if not verdict.ok)
    assert name in broken.name


def test_the_section_shows_both_lists_and_how_the_table_grew() -> None:
    text = section(STATUS, FOUND, verdicts(STATUS, FOUND), "today on this")
    assert "| /v1/devices/offline | 1,000 | 275 | 4 | 6 | 8 |" in text
    assert "| the first one's rows by asyncpg alone | 1,000 |  | 3 | 5 | 7 |" in text
    assert "| 100,000 | 60 | 80 | 75,000 | 78% | 20.0 + 4.0 | 25.0 + 5.0 | 1.25 |" in text
    assert "`make bench-status` writes this section. Measured today on this. " in text
    assert NOT_QUIET not in text
    assert NOT_QUIET in section(STATUS, replace(FOUND, others_cores=1.0), (), "")


def test_the_page_that_is_kept_has_its_markers() -> None:
    between(PAGE.read_text(encoding="utf-8"), "", BEGIN, END)
