"""Everything that README.md, bench/README.md and docs/performance.md name exists: commands, options, targets, links and
limits. Their figures are those of bench/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.__main__ import make_parser
from bench.finding import figure
from bench.runs.archive import Archive
from tests.support.runbook import anchors

HOUSE = Path(__file__).parents[2]
PAGES = ("README.md", "bench/README.md", "docs/performance.md")
TEXTS = {page: (HOUSE / page).read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES}
COMMANDS: dict[str, Any] = make_parser()._subparsers._group_actions[0].choices  # type: ignore


@pytest.mark.parametrize("page", PAGES)
def test_every_bench_command_on_a_page_exists_with_its_options(page: str) -> None:
    for line in TEXTS[page].splitlines():
        if name := re.search(r"python -m bench ([a-z]+)", line):
            options = {option for each in COMMANDS[name[1]]._actions for option in each.option_strings}
            assert set(re.findall(r"--[a-z-]+", line)) <= options, line


def test_every_command_of_bench_is_on_its_page() -> None:
    named = set(re.findall(r"(?:python -m bench |make (?:bench-)?)([a-z]+)", TEXTS["bench/README.md"]))
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_on_a_page_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (HOUSE / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^ *|`)(?:sudo )?make ([a-z-]+)(?=  |`| [A-Z]|$)", TEXTS[page], re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        there = (HOUSE / page).parent / path if path else HOUSE / page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), link


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("archive", f"the daemon grows by < {Archive().growth_mb:g} MB; p99 of ingest < {Archive().p99_ms:g} ms"),
        ("archive", f"≤ {Archive().bytes_per_row:g} bytes a heartbeat"),
    ],
)
def test_the_table_of_scenarios_has_the_limits(scenario: str, said: str) -> None:
    (row,) = re.findall(rf"^\| {scenario} \| .*", TEXTS["bench/README.md"], re.MULTILINE)
    assert said in row


def result(name: str) -> Any:
    """Return the stored result of a command of bench."""
    return json.loads((HOUSE / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["compare", "curve", "status", "daemons"])
def test_each_section_of_the_page_has_the_verdicts_of_its_result(name: str) -> None:
    section = TEXTS["docs/performance.md"].partition(f"<!-- {name}:begin")[2].partition(f"<!-- {name}:end")[0]
    said = re.findall(r"\| (\S+) \| [≤≥] (\S+) \| (kept|\*\*broken\*\*) \|$", section, re.MULTILINE)
    marks = {True: "kept", False: "**broken**"}
    found = result(name)["verdicts"]
    assert said == [(figure(each["value"]), figure(each["limit"]), marks[each["ok"]]) for each in found]


def test_the_readme_has_the_figures_of_the_results() -> None:
    steady, soak, idle, reconnect = (
        result(name)["details"] for name in ("2-steady-2000", "soak", "idle", "4-reconnect")
    )
    lists = [each["p95_ms"] for each in result("3-offline-query")["details"]["http"].values()]
    moved, (rates, _, connections, _) = (
        result("import")["details"]["import"],
        result("compare")["details"]["singles"]["nexhb"],
    )
    steady_mb = steady["extra"]["daemon_rss_mb"]
    per_s = moved["heartbeats"]["written"] / moved["seconds"]
    for text in (
        f"p50 {steady['p50_ms']:.1f} ms, p99 {steady['p99_ms']:.1f} ms, daemon {steady_mb:.0f} MB",
        f"p50 {soak['p50_ms']:.1f} ms, p99 {soak['p99_ms']:.1f} ms; memory",
        f"{result('3-offline-query')['verdicts'][0]['value']:,.0f} times as long |",
        f"offline and unity-down over HTTP | p95 {lists[0]:.1f} and {lists[1]:.1f} ms",
        f"{reconnect['ok']:,} committed in {reconnect['extra']['drained_s']:.1f} s",
        f"{median(rates):,.0f} heartbeats/s committed over {connections:,} connections",
        f"idle connections beside {idle['devices']:,} devices | the devices' p99 {idle['p99_ms']:.0f} ms",
        f"| {per_s:,.0f} rows/s of the 10,000 allowed",
    ):
        assert text in TEXTS["README.md"]
