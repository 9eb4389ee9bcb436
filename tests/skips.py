"""Which tests may be skipped, and why the run is worth something without them. Any other skip is a failure: a test that
nobody runs is believed to pass."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

import pytest

HERE = Path(__file__).parent

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# What .ci/run installs. There, with TEST_TOOLS_REQUIRED set, their absence is a failure.
TOOLS = {
    "pgbouncer is not installed": "a developer's machine may lack it",
    "nginx is not installed": "a developer's machine may lack it",
    "haproxy is not installed": "a developer's machine may lack it",
    "promtool is not installed .*": "a developer's machine may lack it",
    "no systemd-analyze here: .*": "a developer's machine may lack it",
}
# By the reason that the test gives.
MACHINES = {
    "no /usr/bin/python3 with ensurepip here: .*": "an installation needs a Python outside of private homes",
    "the peers are of the extra compare: .*": "only `make bench-compare` installs what nexhb is compared with",
    "only root can start it as somebody else": "an ordinary user starts PostgreSQL as himself, which other tests do",
    "mounting takes root": "a full and a read-only disk are tested where the tests run as root",
    "no permission binds root": "missing permissions are tested where the tests run as an ordinary user",
    "no PID namespaces here": "a container may be forbidden to make one",
    "this machine makes no network namespaces, or not for this user": "a container may be forbidden to make them",
    r"\w+ can run no Python with nexhb here": "the interpreter or the checkout may lie in a private home",
    "this file system has no disk, or forgets nothing": "tmpfs has no page cache to be told apart from its disk",
    "moto takes any checksum": "the stores that check one are tested beside it",
    "moto holds it in this very process": "its memory is the test's; the other stores are measured",
    "this machine has an /etc/nexhb/nexhb.toml": "its settings are not the defaults",
    "not a git checkout": "an unpacked sdist has no list of tracked files",
}


def allowed(reason: str, *, tools_required: bool) -> bool:
    """Whether a test may be skipped for `reason`."""
    known = MACHINES if tools_required else TOOLS | MACHINES
    return any(re.fullmatch(one, reason, re.DOTALL) for one in known)


def judged(report: Report) -> Report:
    """The report itself, or a failure where a test was skipped for a reason that is not listed."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not allowed(reason, tools_required=bool(os.environ.get("TEST_TOOLS_REQUIRED"))):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped: {reason}\nThat reason is not listed in tests/skips.py."
    return report
