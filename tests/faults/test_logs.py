"""Test the check of the logs: which errors a fault explains, and which are unexpected."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.faults.logs import ALLOWED, read, repeating, unexpected

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


def line(event: str, level: str = "warning", at_s: float = 0.0, **fields: object) -> str:
    """Return a log line as nexhb writes it."""
    return json.dumps({"event": event, "level": level, "ts": (NOON + timedelta(seconds=at_s)).isoformat(), **fields})


@pytest.mark.parametrize(
    "text",
    [
        line("batch.failed_unexpectedly", "error", error="UnboundLocalError: impossible"),
        line("http.unexpected", "error", path="/v1/heartbeat", exception="Traceback …\nKeyError: 'x'"),
        line("adoption.failed", "warning", exception="Traceback …\nValueError: x"),
        line("writer.not_ready", "error", error="KeyError: 'x'"),
        line("job.failed", "error", exception="Traceback …\nasyncpg.exceptions.UndefinedTableError: x"),
        line("library.log", "error", room="asyncio", message="Task exception was never retrieved"),
        "Traceback (most recent call last):\n  File …\nMemoryError\n",
    ],
)
def test_an_error_that_no_fault_explains_is_unexpected(text: str) -> None:
    assert len(list(unexpected(read([text])))) == 1


@pytest.mark.parametrize(
    "text",
    [
        line("batch.retry", error="ConnectionResetError: x"),
        line("writer.not_ready", "error", error="ConnectionRefusedError: x"),
        line("job.failed", "error", exception="Traceback …\nasyncpg.exceptions.AdminShutdownError: x"),
        line("job.failed", "error", exception="Traceback …\nnexhb.errors.LockLost: x"),
        line(
            "job.failed",
            "error",
            error="JobFailed: The job did not complete all of its work. The job's connection was lost: x",
        ),
        line("job.failed", "error", error="JobFailed: 8Z here and 9Z in the database: set the clocks."),
        line("job.failed", "error", error="DatabaseUnavailable: x"),
        line(
            "job.failed", "error", exception="Traceback …\nnexhb.errors.JobFailed: … The job's connection was lost: x"
        ),
        line(
            "nightly_maintenance.step_failed",
            "error",
            exception="Traceback …\nasyncpg.exceptions.DiskFullError: x\nHINT:  Check free disk space.",
        ),
        line("writer.not_ready", "error", error="InDoubt: COMMIT was not answered."),
        line(
            "job.failed",
            "error",
            exception="…\nnexhb.errors.JobFailed: 8Z here and 9Z in the database: set the clocks.",
        ),
        line("job.failed", "error", error="MemoryError: ", exception="… import FolderStore\nMemoryError"),
        line("library.log", "error", room="asyncio", message="deallocating an open event loop"),
        "  a table of a command\n",
    ],
)
def test_an_error_that_a_fault_explains_is_expected(text: str) -> None:
    assert list(unexpected(read([text]))) == []


def test_repeated_errors_are_reported_once_with_their_number() -> None:
    (reason,) = unexpected(read([line("http.unexpected", "error", exception="…\nKeyError: 'x'")] * 7))
    assert reason.startswith("7 times")


def test_only_a_warning_that_repeats_after_the_end_of_all_faults_is_reported() -> None:
    entries = list(read(line("devices.listen_lost", at_s=at_s) for at_s in (-3, 1, 6, 11))) + list(
        read([line("batch.retry", at_s=-1), line("batch.retry", at_s=-0.5), line("batch.retry", at_s=0.5)])
    )
    (reason,) = repeating(entries, NOON, NOON + timedelta(seconds=12))
    assert "devices.listen_lost" in reason
    assert reason.startswith("3 times in 12 s")


def test_late_heartbeats_may_repeat_because_an_archived_day_stays_away() -> None:
    """Shortly after midnight, devices whose clocks are 20 to 70 hours behind write to a day that a fault archives."""
    late = [line("heartbeat.late", at_s=at_s, day="2026-11-29") for at_s in (1, 2)]
    assert list(repeating(read(late), NOON, NOON + timedelta(seconds=12))) == []


def test_each_allowed_event_has_a_reason() -> None:
    assert all(rule.reason.endswith(".") for rule in ALLOWED.values())
