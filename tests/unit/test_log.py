"""A line that cannot be written is lost and counted, and whoever logs goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable

import orjson
import pytest

from nexhb import log


@pytest.fixture
def pipe() -> tuple[int, int]:
    """Its reading and its writing end."""
    return os.pipe()


def fill(descriptor: int) -> None:
    """Until not a byte more goes in."""
    os.set_blocking(descriptor, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(descriptor, b"-" * size)
        except BlockingIOError:
            continue


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nobody_reads_costs_lines_and_no_time_and_what_was_lost_is_said(
    pipe: tuple[int, int], blocking: bool
) -> None:
    reads, writes = pipe
    fill(writes)
    os.set_blocking(writes, blocking)
    lines = log._Stderr(writes)
    before = log.lines_lost()
    for number in range(1_000):  # would take 50 s if each waited
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


def test_half_a_line_is_not_the_start_of_the_next_one(pipe: tuple[int, int]) -> None:
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
def test_a_full_disk_a_reader_who_left_and_a_closed_file_cost_the_line(made: Callable[[], int]) -> None:
    """The exception ended whatever logged, and with it the daemon."""
    before = log.lines_lost()
    log._Stderr(made()).write("lost")
    assert log.lines_lost() == before + 1


def test_another_stream_that_is_closed_costs_the_line() -> None:
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
    """A command that prints a lot, as a shell runs it."""
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
def test_a_command_whose_output_goes_nowhere_says_so_in_a_sentence_or_nothing(
    redirected: str, code: int, said: str
) -> None:
    found = run(redirected)
    assert (found.returncode, said in found.stderr) in ((code, True), (0, True))
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr
