"""Report known vulnerabilities of the packages in bench/requirements.lock, which contains those of the other lock
files: `make audit`.

The audit fails if it finds a vulnerability, and if it could not look for any: the advisory service cannot be reached,
or does not know a package. pip-audit reports a package that its service does not know as a package without
vulnerabilities, so the service is first asked for a package that is known to have some. The audit is not part of
.ci/run, which reaches package registries and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
LOCK = Path(__file__).parents[1] / "bench" / "requirements.lock"
VULNERABLE = "jinja2==2.10"  # CVE-2019-10906, and more since
IGNORED: dict[str, str] = {}  # id: why it does not affect nexhb

Report = dict[str, Any]  # pip-audit's JSON; empty if there was no output


def found(report: Report) -> list[str]:
    """Return one line for each vulnerability of a report."""
    return [
        f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'none yet'}"
        for package in report.get("dependencies", [])
        for one in package.get("vulns", [])
        if one["id"] not in IGNORED
    ]


def skipped(report: Report) -> list[str]:
    """Return the packages that the service does not know."""
    return [package["name"] for package in report.get("dependencies", []) if "skip_reason" in package]


def ask(folder: Path, requirements: Path) -> Report:
    """Return the report of pip-audit, installed in `folder`, for pinned requirements."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"),
        *("--format", "json", "--progress-spinner", "off", "--timeout", "5", "--cache-dir", str(folder / "cache")),
    ]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    try:
        said = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300).stdout
        report: Report = json.loads(said)
    except (ValueError, subprocess.TimeoutExpired):
        return {}
    return report


def install(folder: Path) -> None:
    """Install pip-audit into `folder`, which nothing else uses."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--target", str(folder), PIP_AUDIT], check=True)


def main() -> int:
    """Audit the requirements, and return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(folder)
        known = folder / "vulnerable.txt"
        known.write_text(f"{VULNERABLE}\n")
        report = ask(folder, LOCK) if found(ask(folder, known)) else {}
    if not report:
        print("audit: FAILED: nothing was checked, because the advisory service cannot be reached")
        return 1
    for line in found(report):
        print(line)
    left_out = f"; not checked: {', '.join(skipped(report))}" if skipped(report) else ""
    print(f"audit: {len(found(report))} known vulnerabilities{left_out}")
    return 1 if found(report) or skipped(report) else 0


if __name__ == "__main__":
    sys.exit(main())
