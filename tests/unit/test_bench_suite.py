"""What is said about results: limits kept or broken, the table of all, growth of memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench import stack, suite
from bench.__main__ import app, finish
from bench.compare.command import PAGE
from bench.compare.page import verdict_table
from bench.cost import Sample, growth_of, trend_of
from bench.finding import NOT_QUIET, Finding
from bench.micro import command as micro
from bench.micro.scratch import text_table
from bench.report import ALL_ACKNOWLEDGED, Limit, Result, hold, judge
from bench.runs import idle, outage, soak
from bench.scenarios import SCENARIOS, Scenario
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
    monkeypatch.setattr(suite, "run_one", does_not_start)
    outcome = CliRunner().invoke(app, ["all", "--only", "1", "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "it did not start" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def ends_badly(*_: object) -> Finding:
    return Finding("one", "first", (hold(FAST, 25), hold(FAST, 3)), {})


def does_not_start(*_: object, **__: object) -> Finding:
    raise StackError("it did not start")


@pytest.mark.parametrize("run", [ends_badly, does_not_start])
@pytest.mark.parametrize(
    ("command", "where"), [("archive", suite), ("overload", suite), ("outage", outage), ("idle", idle), ("soak", soak)]
)
def test_a_command_of_one_scenario_ends_with_its_result_and_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, where: ModuleType, run: Callable[..., Finding]
) -> None:
    monkeypatch.setattr(where, "run_one" if where is suite else "run", run)
    outcome = CliRunner().invoke(app, [command, "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    (kept,) = tmp_path.glob("*.json")
    assert outcome.output.endswith(f"Result in {kept}.\n1 limit broken.\n")
    assert (tmp_path / "summary.md").is_file()


def test_many_scenarios_end_with_those_that_are_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(scenario: Scenario) -> Finding:
        slow = scenario.name != "2-steady-2000"
        return Finding(scenario.name, "", (hold(FAST, 25 if slow else 3),), {})

    monkeypatch.setattr(suite, "run_one", run)
    only = [word for name in ("1", "2", "3") for word in ("--only", name)]
    outcome = CliRunner().invoke(app, ["all", *only, "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert outcome.output.endswith(
        f"Results in {tmp_path}, the table of them all in {tmp_path / 'summary.md'}.\n"
        "2 limits broken in 1-steady-500, 3-offline-query.\n"
    )


def test_micro_ends_with_where_its_results_are_and_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def weighs(*, quick: bool) -> list[Finding]:
        held = hold(FAST, 25 if quick else 3)
        return [Finding("micro-rows", "", (held,), {"table": ""}), Finding("micro-status", "", (), {"table": ""})]

    monkeypatch.setattr(micro, "_all", weighs)
    outcome = CliRunner().invoke(app, ["micro", "--quick", "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert f"Results in {tmp_path}," in outcome.output
    assert outcome.output.endswith("1 limit broken in micro-rows.\n")


@pytest.mark.parametrize("words", [["load", "--duration", "1"], ["demo", "--duration", "1"], ["import", "--days", "1"]])
def test_a_load_whose_daemon_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(stack, "running", does_not_start)
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 1
    assert outcome.output.endswith("it did not start\n")


def test_a_load_ends_with_its_result_and_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys((field.name for field in fields(Result) if field.default is MISSING), 0)
    result = Result(**{**nothing, "mode": "open loop", "statuses": {}, "failures": {}, "extra": {}})  # type: ignore[arg-type]
    kept = tmp_path / "load.json"
    with pytest.raises(typer.Exit) as left:
        finish(judge(result, ALL_ACKNOWLEDGED), kept)
    assert left.value.exit_code == 1
    assert kept.is_file()
    assert capsys.readouterr().out.endswith(f"Result in {kept}.\n1 limit broken.\n")


def test_other_settings_than_the_defaults_never_replace_the_figures(tmp_path: Path) -> None:
    assert suite.where(None, usual=True) == suite.RESULTS
    assert suite.where(None, usual=False) == suite.RESULTS / "quick"
    assert suite.where(tmp_path, usual=False) == tmp_path


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
