"""Run one short seed of the fault machine; `make faults SEEDS=100` runs 100 at full length."""

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

from bench.process import ROOT
from tests.faults.__main__ import run_seed
from tests.faults.journal import Event


async def test_no_acknowledged_heartbeat_is_lost_during_ten_seconds_of_faults() -> None:
    outcome = await run_seed(seed=1, devices=24, seconds=10.0, logs=None)
    assert [str(violation) for violation in outcome.violations] == []
    assert sum(not fault.failed for fault in outcome.injected) >= 10
    assert outcome.counts[Event.ACKNOWLEDGED] > 500
    assert outcome.counts[Event.UNKNOWN] > 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that PostgreSQL's own user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-guard-"))
    folder.chmod(0o711)
    yield folder
    folder.rmdir()


def processes_of(folder: Path) -> set[int]:
    """Return the PIDs of the processes that work in the folder, or have it in their command line or environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = b"".join((process / name).read_bytes() for name in ("cmdline", "environ")).decode(errors="replace")
            if str(folder) in told or str(folder) in str((process / "cwd").readlink()):
                found.add(int(process.name))
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll until the condition holds: no event reports the end of processes that are not children of this one."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_leaves_no_process_and_no_file(folder: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--seconds", "60"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: any('"daemon.started"' in log.read_text() for log in folder.glob("*/a/daemon.log")), 60)
        assert len(processes_of(folder)) >= 2  # at least a daemon and a postmaster
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not processes_of(folder) and not list(folder.iterdir()), 40)
