"""What is said about results: limits kept or broken, the table of all, growth of memory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench import suite
from bench.__main__ import app
from bench.compare.command import PAGE
from bench.compare.page import verdict_table
from bench.cost import Sample, growth_of, trend_of
from bench.finding import NOT_QUIET, Finding
from bench.micro.scratch import text_table
from bench.report import Limit, hold
from bench.scenarios import SCENARIOS
from bench.stack import StackError

FAST = Limit("fast", "p99_ms", 20)


def test_the_summary_has_every_result_that_lies_there(tmp_path: Path) -> None:
    suite.write(Finding("one", "first", (hold(FAST, 3.21),), {"rate": "9/s"}), tmp_path)
    suite.write(Finding("two", "second", (hold(FAST, 25),), {"table": "a  b\n1  2"}), tmp_path)
    # bench import keeps what it found in a form of its own
    (tmp_path / "import.json").write_text('{"rate": 1}', encoding="utf-8")
    text = suite.write_summary(tmp_path).read_text(encoding="utf-8")
    assert "| one | fast | 3.21 | ≤ 20 | kept |" in text
    assert "| two | fast | 25 | ≤ 20 | **broken** |" in text
    assert "- rate: 9/s" in text
    assert "```\na  b\n1  2\n```" in text
    found = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert found["ok"] is False
    assert {"measured_at", "machine", "verdicts", "details"} <= found.keys()


def test_a_pipe_in_a_cell_is_no_cell_and_large_values_have_their_digits(tmp_path: Path) -> None:
    name = "times as long as psql | zstd, alone"
    kept = hold(Limit(name, "", 3_000), 2_824.31)
    suite.write(Finding("one", "first", (kept,), {}), tmp_path)
    text = suite.write_summary(tmp_path).read_text(encoding="utf-8")
    row = r"times as long as psql \| zstd, alone | 2,824 | ≤ 3,000 | kept |"
    assert f"| one | {row}" in text
    assert f"| {row}" in verdict_table((kept,))
    assert suite.said(kept).startswith("2,824  (≤ 3,000)")


@pytest.mark.parametrize(
    ("values", "others", "said"),
    [
        ((1.0, 1.0), (0.1,), ()),
        ((1.0, 25.0), (), ("1 limit broken.",)),
        ((25.0, 25.0), (0.0, 0.11), ("2 limits broken.", NOT_QUIET)),
    ],
)
def test_a_command_ends_with_where_its_result_is_and_what_is_wrong_with_it(
    tmp_path: Path, values: tuple[float, ...], others: tuple[float, ...], said: tuple[str, ...]
) -> None:
    finding = Finding("one", "first", tuple(hold(FAST, value) for value in values), {}, others_cores=others)
    text = io.StringIO()
    console = Console(file=text, width=60)
    suite.keep(finding, tmp_path, console)
    with pytest.raises(typer.Exit) as left:
        suite.end(finding, tmp_path, console)
    assert left.value.exit_code == (0 if finding.ok else 1)
    assert (tmp_path / "one.json").is_file()
    assert text.getvalue().endswith("\n".join((f"Result in {tmp_path / 'one.json'}.", *said, "")))


def test_a_daemon_that_does_not_start_is_a_broken_scenario(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: object) -> Finding:
        raise StackError("it did not start")

    monkeypatch.setattr(suite, "run_one", fails)
    outcome = CliRunner().invoke(app, ["all", "--only", "1", "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "it did not start" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["compare", "curve", "status", "daemons"])
def test_each_section_of_the_page_says_which_command_writes_it(name: str) -> None:
    found = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name}:begin")[2].partition(f"<!-- {name}:end")[0]
    assert f"\n`make bench-{name}` writes this section. Measured " in found


def test_an_unknown_scenario_is_wrong_usage() -> None:
    outcome = CliRunner().invoke(app, ["all", "--only", "nine"])
    assert outcome.exit_code == 2
    assert "1-steady-500" in outcome.output


def test_every_scenario_has_a_name_of_its_own_and_a_shorter_form() -> None:
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)
    assert all(each.quicker().name == each.name for each in SCENARIOS)


def test_growth_is_seen_by_both_measures() -> None:
    level = [Sample(5.0 * n, 90 + n % 2) for n in range(60)]
    rising = [Sample(5.0 * n, 90 + 0.2 * n) for n in range(60)]
    assert abs(growth_of(level)) < 0.1
    assert abs(trend_of(level)) < 0.1
    assert growth_of(rising) == pytest.approx(0.2 * 54)
    assert trend_of(rising) == pytest.approx(0.2 * 59)


def test_a_text_table_is_aligned() -> None:
    table = text_table(("what", "bytes"), [("a", "1"), ("longer", "1,234")])
    assert table.splitlines() == ["what    bytes", "------  -----", "a           1", "longer  1,234"]
