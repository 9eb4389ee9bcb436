"""What the audit of dependencies concludes from the reports of pip-audit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import audit

VULNERABLE = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "CVE-2019-10906", "fix_versions": ["2.10.1"]}]}
CLEAN = {"name": "orjson", "version": "3.13.0", "vulns": []}
NOT_THERE = {"name": "uvloop", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def heard(monkeypatch: pytest.MonkeyPatch, *reports: audit.Report) -> list[str]:
    """Let pip-audit return these reports in turn; return the list of the requirements that it is asked about."""
    asked: list[str] = []

    def ask(_folder: Path, requirements: Path) -> audit.Report:
        asked.append(requirements.read_text())
        return reports[len(asked) - 1]

    monkeypatch.setattr(audit, "ask", ask)
    monkeypatch.setattr(audit, "install", lambda _folder: None)
    return asked


@pytest.mark.parametrize("silence", [{}, {"dependencies": [NOT_THERE]}, {"dependencies": [CLEAN]}])
def test_a_service_that_does_not_report_a_known_vulnerability_fails_the_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], silence: audit.Report
) -> None:
    asked = heard(monkeypatch, silence)
    assert audit.main() == 1
    assert asked == [f"{audit.VULNERABLE}\n"]
    assert "nothing was checked" in capsys.readouterr().out


def test_a_service_that_stops_responding_fails_the_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard(monkeypatch, {"dependencies": [VULNERABLE]}, {})
    assert audit.main() == 1
    assert "nothing was checked" in capsys.readouterr().out


def test_a_package_that_the_service_does_not_know_fails_the_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard(monkeypatch, {"dependencies": [VULNERABLE]}, {"dependencies": [CLEAN, NOT_THERE]})
    assert audit.main() == 1
    assert capsys.readouterr().out == "audit: 0 known vulnerabilities; not checked: uvloop\n"


def test_a_lock_without_known_vulnerabilities_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    heard(monkeypatch, {"dependencies": [VULNERABLE]}, {"dependencies": [CLEAN]})
    assert audit.main() == 0


def test_a_known_vulnerability_fails_the_audit_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = heard(monkeypatch, {"dependencies": [VULNERABLE]}, {"dependencies": [CLEAN, VULNERABLE, NOT_THERE]})
    assert audit.main() == 1
    assert asked[1] == audit.LOCK.read_text()
    out = capsys.readouterr().out
    assert "jinja2 2.10: CVE-2019-10906, mended in 2.10.1" in out
    assert "1 known vulnerabilities; not checked: uvloop" in out


def test_an_ignored_vulnerability_does_not_fail_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.found({"dependencies": [VULNERABLE]})
    monkeypatch.setitem(audit.IGNORED, "CVE-2019-10906", "nexhb renders nothing")
    assert not audit.found({"dependencies": [VULNERABLE]})
