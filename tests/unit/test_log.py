"""A log line that cannot be written is lost and counted, and the caller continues."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable

import orjson
import pytest

from nexhb import log
from tests.support.pipes import fill


@pytest.fixture
def pipe() -> tuple[int, int]:
    """Return the reading and the writing end of a pipe."""
    return os.pipe()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_without_a_reader_loses_lines_without_delay_and_the_loss_is_logged(
    pipe: tuple[int, int], blocking: bool
) -> None:
    reads, writes = pipe
    fill(writes)
    os.set_blocking(writes, blocking)
    lines = log._Stderr(writes)
    before = log.lines_lost()
    for number in range(1_000):  # the loop would take 50 s if the caller waited for each line
        lines.write(f"lost {number}")
    assert log.lines_lost() - before == 1_000
    os.read(reads, 2**20)
    lines.write("read again")
    said = os.read(reads, 2**20).splitlines()
    assert orjson.loads(said[0]) | {"ts": ""} == {
        "ts": "", "level": "warning", "room": "log", "event": "log.lines_lost", "lost": 1_000,
    }  # fmt: skip
    assert said[1] == b"read again"
    os.close(reads)
    os.close(writes)


def test_a_partial_line_does_not_run_into_the_next_one(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    lines = log._Stderr(writes)
    lines.write("x" * 2**18)  # more than a pipe holds
    assert os.read(reads, 2**20).startswith(b"xxx")
    lines.write("next")
    assert os.read(reads, 2**20).splitlines()[-1] == b"next"
    os.close(reads)
    os.close(writes)


def _closed_pipe() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def _closed() -> int:
    writes = os.dup(2)
    os.close(writes)
    return writes


@pytest.mark.parametrize("made", [_closed_pipe, _closed, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_a_full_disk_a_closed_pipe_and_a_closed_file_lose_the_line(made: Callable[[], int]) -> None:
    """Formerly, the exception ended the task that logged, and with it the daemon."""
    before = log.lines_lost()
    log._Stderr(made()).write("lost")
    assert log.lines_lost() == before + 1


def test_another_closed_stream_loses_the_line() -> None:
    stream = io.StringIO()
    stream.close()
    before = log.lines_lost()
    log._Stream(stream).write("lost")
    assert log.lines_lost() == before + 1


@pytest.mark.parametrize("value", ["\udc80", 2**70, {1: "\ud800"}, object(), b"\xff"])
def test_every_value_can_be_logged(value: object) -> None:
    assert orjson.loads(log._dumps({"event": "x", "value": value}).replace("\\ud", "d"))["event"] == "x"


# ---- what commands print ----------------------------------------------------------------------------------------


def run(redirected: str) -> subprocess.CompletedProcess[str]:
    """Run a command with much output in a shell."""
    command = f"{sys.executable} -m nexhb config check {redirected}"
    return subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full", 1, "No space left on device"),
        (">/dev/full 2>&1", 1, ""),
        ("| true; exit ${PIPESTATUS[0]}", 1, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_a_command_whose_output_fails_prints_one_sentence_or_nothing(redirected: str, code: int, said: str) -> None:
    found = run(redirected)
    assert (found.returncode, said in found.stderr) in ((code, True), (0, True))
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr
