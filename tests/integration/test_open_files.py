"""Formerly, a daemon that an ordinary user started was limited to 1,024 open files: with 2,000 devices, it closed the
connection of every second device. Now the daemon raises its limit to the hard limit. `make demo` on a bare Debian
showed the problem; for root the limit is high."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

CODE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
from nexhb import log, open_files
log.setup("warning")
open_files.raise_open_files_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_daemon_raises_its_limit_of_open_files_to_the_hard_limit() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2048"
    assert "LimitNOFILE" in done.stderr


def not_started(limits: tuple[int, int], folder: Path) -> tuple[list[str], str]:
    """Start a daemon with these limits (soft, hard) on open files, in a place where it cannot create a database.

    Return the errors of its `daemon.not_started` events, and all that it wrote.
    """
    (folder / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "nexhb", "serve"],
        env=os.environ | {"NEXHB_DATA_DIR": str(folder / "file" / "data")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return [event["error"] for event in events if event["event"] == "daemon.not_started"], done.stderr


def test_an_event_loop_that_cannot_be_created_is_an_event(tmp_path: Path) -> None:
    """Formerly, a daemon whose open files were used up during its start ended with a warning about a coroutine, without
    an event."""
    errors, written = not_started((9, 9), tmp_path)
    assert errors == ["OSError: [Errno 24] Too many open files"]
    assert written.endswith("nexhb: [Errno 24] Too many open files\n")
    assert "never awaited" not in written


def test_the_soft_limit_is_raised_before_the_event_loop_is_created(tmp_path: Path) -> None:
    errors, written = not_started((9, 4096), tmp_path)
    assert "there is a file where a folder should be" in errors[0]
    assert "Too many open files" not in written
