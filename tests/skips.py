"""The reasons for which a test may be skipped. Any other skip is a failure, because a test that never runs looks like a
test that passes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

import pytest

HERE = Path(__file__).parent

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# Tools that .ci/run installs. .ci/run also sets TEST_TOOLS_REQUIRED, which makes a missing tool a failure.
TOOLS = {
    "pgbouncer is not installed": "a developer's machine may lack it",
    "nginx is not installed": "a developer's machine may lack it",
    "haproxy is not installed": "a developer's machine may lack it",
    "promtool is not installed .*": "a developer's machine may lack it",
    "systemd-analyze is not installed: .*": "a developer's machine may lack it",
}
# Reasons of skips that depend on the machine, and why each is allowed.
MACHINES = {
    "/usr/bin/python3 with ensurepip is not installed: .*": "a Python in a private home is not usable for it",
    "the extra compare is not installed: .*": "only `make bench-compare` installs what nexhb is compared with",
    "only root can start PostgreSQL as another user": "other tests start PostgreSQL as an ordinary user",
    "only root can mount a disk": "a full and a read-only disk are tested if the tests run as root",
    "root bypasses file permissions": "missing permissions are tested if an ordinary user runs the tests",
    "PID namespaces are not available": "a container may not be allowed to create a namespace",
    r"\w+ cannot run Python with nexhb": "the interpreter or the checkout may be in a private home directory",
    "the pages of files cannot be evicted from the page cache": "tmpfs has no disk behind its page cache",
    "moto does not verify checksums": "the test also runs with stores that verify checksums",
    "moto stores objects in the memory of the tests' process": "the test also runs with other stores",
    "this machine has an /etc/nexhb/nexhb.toml": "the test expects the default settings",
    "not a git checkout": "an unpacked sdist has no list of tracked files",
}


def allowed(reason: str, *, tools_required: bool) -> bool:
    """Return whether a test may be skipped for `reason`."""
    reasons = MACHINES if tools_required else TOOLS | MACHINES
    return any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in reasons)


def fail_unlisted_skip(report: Report) -> Report:
    """Return the report, turned into a failure if its test was skipped for a reason that is not listed."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not allowed(reason, tools_required=bool(os.environ.get("TEST_TOOLS_REQUIRED"))):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped: {reason}\ntests/skips.py does not list that reason."
    return report
