"""One short seed of the fault machine; `make faults SEEDS=100` is the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.__main__ import one
from tests.faults.daemon import ROOT
from tests.faults.record import What


async def test_through_a_short_storm_of_faults_nothing_acknowledged_is_lost() -> None:
    outcome = await one(seed=1, devices=24, seconds=10.0, logs=None)
    assert [str(violation) for violation in outcome.violations] == []
    assert sum(not struck.failed for struck in outcome.struck) >= 10
    assert outcome.counts[What.ACKNOWLEDGED] > 500
    assert outcome.counts[What.UNKNOWN] > 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that PostgreSQL's own user can pass."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-guard-"))
    folder.chmod(0o711)
    yield folder
    folder.rmdir()


def processes_of(folder: Path) -> set[int]:
    """Who works in that folder, or was told of it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes().decode(errors="replace")
            if str(folder) in told or str(folder) in str((process / "cwd").readlink()):
                found.add(int(process.name))
    return found


def until(true: Callable[[], bool], bound_s: float) -> None:
    """Wait for it: what is waited for belongs to nobody here any more, and says nothing."""
    deadline = time.monotonic() + bound_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_left_running_or_lying_when_the_machine_is_killed(folder: Path) -> None:
    machine = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--seconds", "60"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: any('"daemon.started"' in log.read_text() for log in folder.glob("*/a/daemon.log")), 60)
        assert len(processes_of(folder)) >= 2  # a daemon and a postmaster at the least
    finally:
        machine.kill()
        machine.wait()
    until(lambda: not processes_of(folder) and not list(folder.iterdir()), 40)
