"""What README.md, bench/README.md and docs/performance.md name is there: commands, options, targets, links, limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.__main__ import app
from bench.runs.archive import BYTES
from bench.scenarios import ARCHIVE, CEILING, IDLE
from tests.promises.runbook import anchors

HOUSE = Path(__file__).parents[2]
PAGES = ("README.md", "bench/README.md", "docs/performance.md")
TEXTS = {page: (HOUSE / page).read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_bench_is_one_with_these_options(page: str) -> None:
    for line in TEXTS[page].splitlines():
        if name := re.search(r"python -m bench ([a-z]+)", line):
            options = {option for each in COMMANDS[name[1]].params for option in each.opts}
            assert set(re.findall(r"--[a-z-]+", line)) <= options, line


def test_every_command_of_bench_is_on_its_page() -> None:
    named = set(re.findall(r"(?:python -m bench |make (?:bench-)?)([a-z]+)", TEXTS["bench/README.md"]))
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_target_is_one_of_the_makefile(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (HOUSE / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^ *|`)(?:sudo )?make ([a-z-]+)(?=  |`| [A-Z]|$)", TEXTS[page], re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
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
        ("5-ceiling", f"≥ {CEILING.ratio.limit:.2f} of the bare handler's rate"),
        ("archive", f"the daemon grows by < {ARCHIVE.growth.limit:g} MB; p99 of ingest < {ARCHIVE.p99.limit:g} ms"),
        ("archive", f"alone ≤ {ARCHIVE.ratio.limit:g} times as long as"),
        ("archive", f"≤ {BYTES.limit:g} bytes a heartbeat"),
        ("idle", f"≤ {IDLE.memory.limit:g} kB of the daemon's memory for each"),
    ],
)
def test_the_table_of_scenarios_has_the_limits(scenario: str, said: str) -> None:
    (row,) = re.findall(rf"^\| {scenario} \| .*", TEXTS["bench/README.md"], re.MULTILINE)
    assert said in row
