"""Skips that are allowed, and those that fail the run."""

from __future__ import annotations

import pytest

from tests import skips


def skipped(reason: str) -> pytest.TestReport:
    """What pytest reports of a test that was skipped for `reason`."""
    why = ("tests/test_x.py", 1, f"Skipped: {reason}")
    return pytest.TestReport("test_x.py::test_it", ("test_x.py", 1, "test_it"), {}, "skipped", why, "call")


@pytest.fixture(autouse=True)
def _developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TOOLS_REQUIRED", raising=False)


def test_a_skip_for_a_listed_reason_stays_a_skip() -> None:
    assert skips.judged(skipped("pgbouncer is not installed")).skipped
    assert skips.judged(skipped("nobody can run no Python with nexhb here")).skipped


@pytest.mark.parametrize("reason", ["it is flaky", "", "moto takes any checksum, and more"])
def test_a_skip_for_any_other_reason_is_a_failure_that_names_it(reason: str) -> None:
    report = skips.judged(skipped(reason))
    assert report.failed
    assert f"test_it was skipped: {reason}" in str(report.longrepr)


def test_what_ci_installs_may_not_be_missing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOOLS_REQUIRED", "1")
    assert skips.judged(skipped("pgbouncer is not installed")).failed
    assert skips.judged(skipped("only root can start it as somebody else")).skipped


def test_no_reason_is_listed_that_no_test_gives() -> None:
    sources = [path.read_text() for path in skips.HERE.rglob("test_*.py") if path != skips.HERE / "unit/test_skips.py"]
    for reason in skips.TOOLS | skips.MACHINES:
        fixed = reason.replace(".*", "").replace(r"\w+", "").replace("/usr/bin/python3", "").strip()
        assert any(part in text for text in sources for part in (fixed, fixed.removeprefix("no  "))), reason


def test_the_run_itself_fails_for_a_skip_that_is_not_listed(request: pytest.FixtureRequest) -> None:
    """Each of the two ways of skipping goes through the list: a test's, and a whole file's."""
    hooks = request.config.pluginmanager.hook
    for hook in (hooks.pytest_runtest_makereport, hooks.pytest_make_collect_report):
        assert any("conftest" in str(found.plugin_name) for found in hook.get_hookimpls())
