"""Skips that are allowed, and those that fail the run."""

from __future__ import annotations

import pytest

from tests import skips


def skipped(reason: str) -> pytest.TestReport:
    """Return pytest's report of a test skipped for `reason`."""
    why = ("tests/test_x.py", 1, f"Skipped: {reason}")
    return pytest.TestReport("test_x.py::test_it", ("test_x.py", 1, "test_it"), {}, "skipped", why, "call")


@pytest.fixture(autouse=True)
def _developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TOOLS_REQUIRED", raising=False)


def test_a_skip_for_a_listed_reason_stays_a_skip() -> None:
    assert skips.fail_unlisted_skip(skipped("pgbouncer is not installed")).skipped
    assert skips.fail_unlisted_skip(skipped("nobody cannot run Python with nexhb")).skipped


@pytest.mark.parametrize("reason", ["it is flaky", "", "moto does not verify checksums, and more"])
def test_a_skip_for_any_other_reason_is_a_failure_that_names_it(reason: str) -> None:
    report = skips.fail_unlisted_skip(skipped(reason))
    assert report.failed
    assert f"test_it was skipped: {reason}" in str(report.longrepr)


def test_a_tool_that_ci_installs_must_not_be_missing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOOLS_REQUIRED", "1")
    assert skips.fail_unlisted_skip(skipped("pgbouncer is not installed")).failed
    assert skips.fail_unlisted_skip(skipped("only root can start PostgreSQL as another user")).skipped


def test_every_listed_reason_is_used_by_a_test() -> None:
    own = (skips.HERE / "skips.py", skips.HERE / "unit" / "test_skips.py")
    sources = [path.read_text() for path in skips.HERE.rglob("*.py") if path not in own]
    for reason in skips.TOOLS | skips.MACHINES:
        fixed_part = reason.replace(".*", "").replace(r"\w+", "").replace("/usr/bin/python3", "").strip()
        assert any(fixed_part in text for text in sources), reason


def test_the_run_itself_fails_for_a_skip_that_is_not_listed(request: pytest.FixtureRequest) -> None:
    """The skip of a test and the skip of a whole file are both checked against the list."""
    hooks = request.config.pluginmanager.hook
    for hook in (hooks.pytest_runtest_makereport, hooks.pytest_make_collect_report):
        assert any("conftest" in str(found.plugin_name) for found in hook.get_hookimpls())
