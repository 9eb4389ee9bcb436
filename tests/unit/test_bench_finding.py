"""The report of a run: limits kept or broken, files, the page, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import stack
from bench.cost import Cost
from bench.finding import NOT_QUIET, PAGE, RESULTS, Finding, is_quiet, section, worst, write, write_page
from bench.report import Limit, at_least, at_most
from bench.runs import Plan, Say
from bench.runs.compare import PEERS
from bench.stack import StackError

KEPT, BROKEN = at_most("fast", 20, 3.21), at_most("fast", 20, 25)


def test_a_limit_is_broken_by_a_value_beyond_it_and_by_none() -> None:
    assert [at_most("", 2, value).ok for value in (2, 2.1, None)] == [True, False, False]
    assert [at_least("", 2, value).ok for value in (2, 1.9, None)] == [True, False, False]
    assert worst([KEPT, BROKEN, KEPT]) == [BROKEN]


def test_a_result_is_written_as_a_summary_that_json_reads(tmp_path: Path) -> None:
    details = {"check": {"ok": True, "lines": [1, 2]}, "limit": Limit("a", "b", 1)}
    one = Finding("one", "first", (KEPT,), {"rate": "9/s", "psql | zstd": "1"}, details)
    path = write(one, tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["verdicts"] == [{"name": "fast", "limit": 20, "value": 3.21, "ok": True, "kind": "at_most"}]
    assert found["details"]["check"] == {"ok": True, "lines": [1, 2]}
    assert found["details"]["limit"]["field"] == "b"
    write(Finding("two", "second", (at_most("psql | zstd", 3_000, 2_824.31), BROKEN), {}), tmp_path)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| one | fast | 3.21 | ≤ 20 | kept |" in text
    assert r"| two | psql \| zstd | 2,824 | ≤ 3,000 | kept |" in text
    assert "| two | fast | 25 | ≤ 20 | **broken** |" in text


def test_results_that_are_kept_are_summaries() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in RESULTS.glob("*.*")) < 2_000


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────


def test_figures_of_a_busy_machine_are_provisional() -> None:
    assert is_quiet(())
    assert is_quiet((0.0, 0.1))
    assert not is_quiet((0.0, 0.11))


def test_what_belongs_to_the_run_is_not_another_load() -> None:
    before, after = Cost(0, 1, 2, 3, 10), Cost(10, 2, 4, 8, 19)
    assert after.since(before).others_cores == 0.1
    assert Cost(10, 1, float("nan"), 5, 9).others_cores is None


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_section_is_written_between_its_markers_and_everything_else_stays(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("Before.\n<!-- x:begin, written by `make bench-x` -->\nold\n<!-- x:end -->\nAfter.\n")
    finding = Finding("x", "", (BROKEN,), {}, others_cores=(0.0, 0.5), page=("## X", "text"))
    write_page(page, finding)
    once = page.read_text(encoding="utf-8")
    assert once.startswith("Before.\n<!-- x:begin, written by `make bench-x` -->\n\n## X\n\n`make bench-x` writes this")
    assert once.endswith("text\n\n<!-- x:end -->\nAfter.\n")
    assert "| fast | 25 | ≤ 20 | **broken** |" in once
    assert NOT_QUIET in once
    assert NOT_QUIET not in section(replace(finding, others_cores=(0.1,)))
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no markers"):
        write_page(page, finding)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fake(Plan):
    """A plan whose run has a given outcome."""

    name: str = "fake"
    title: str = "a run"
    outcome: Callable[[], Finding] = lambda: Finding("fake", "", (BROKEN, KEPT), {})

    def run(self, say: Say) -> Finding:
        """Return the outcome, or raise the exception that it raises."""
        say("now")
        return self.outcome()


def does_not_start() -> Finding:
    raise ExceptionGroup("of a task", [StackError("the daemon did not start")])


def test_a_command_ends_with_where_its_result_is_and_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.execute([Fake()], tmp_path) == 1
    assert capsys.readouterr().out.endswith(f"Result in {tmp_path / 'fake.json'}.\n1 limit broken in fake.\n")
    kept = Fake("kept", outcome=lambda: Finding("kept", "", (KEPT,), {}, others_cores=(1.0,)))
    assert command.execute([Fake(), kept], tmp_path) == 1
    assert capsys.readouterr().out.endswith(f"1 limit broken in fake.\n{NOT_QUIET}\n")
    assert command.execute([kept], tmp_path) == 0


def test_a_daemon_that_does_not_start_is_a_broken_run(tmp_path: Path) -> None:
    assert command.execute([Fake(outcome=does_not_start)], tmp_path) == 1
    assert "the daemon did not start" in (tmp_path / "fake.json").read_text(encoding="utf-8")


def test_a_shorter_run_never_replaces_the_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def record(plans: Sequence[Plan], *where: Path | None) -> int:
        calls.append((plans[0].name, *where))
        return 0

    monkeypatch.setattr(command, "execute", record)
    for words in (["outage"], ["outage", "--quick"], ["outage", "--out", "x"], ["all", "--only", "kill"]):
        assert command.main(words) == 0
    assert calls == [
        ("outage", RESULTS, PAGE),
        ("outage", RESULTS / "quick"),
        ("outage", Path("x"), None),
        ("kill", RESULTS, PAGE),
    ]


@pytest.mark.parametrize("words", [["all", "--only", "nine"], ["load", "--devices", "0"], ["load", "--url", "x"], []])
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(words)
    assert left.value.code == 2


def test_without_the_peers_packages_the_comparison_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["compare", "--quick", "--out", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"not installed: {', '.join(PEERS)}; run make bench-compare" in said


@pytest.mark.parametrize("words", [["load", "--duration", "1"], ["demo", "--duration", "1"]])
def test_a_load_whose_daemon_does_not_start_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise StackError("the daemon did not start")

    monkeypatch.setattr(stack, "running", fails)
    assert command.main(words) == 1
    assert capsys.readouterr().out.endswith("the daemon did not start\n")


def test_every_run_has_a_name_of_its_own_and_a_shorter_form() -> None:
    plans = {*command.SCENARIOS, *command.COMMANDS.values()}
    assert all(plan.quicker().name == plan.name for plan in plans)
    assert len({plan.name for plan in plans}) == len(plans)
