"""The judge of what was logged: which errors a fault explains, and which ones nobody expected."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.faults.logs import ALLOWED, read, repeating, unexpected

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


def line(event: str, level: str = "warning", at_s: float = 0.0, **said: object) -> str:
    """As nexhb writes it."""
    return json.dumps({"event": event, "level": level, "ts": (NOON + timedelta(seconds=at_s)).isoformat(), **said})


@pytest.mark.parametrize(
    "one",
    [
        line("batch.failed_unexpectedly", "error", error="UnboundLocalError: impossible"),
        line("http.unexpected", "error", path="/v1/heartbeat", exception="Traceback …\nKeyError: 'x'"),
        line("adoption.failed", "warning", exception="Traceback …\nValueError: x"),
        line("writer.not_ready", "error", error="KeyError: 'x'"),
        line("job.failed", "error", exception="Traceback …\nasyncpg.exceptions.UndefinedTableError: x"),
        "Traceback (most recent call last):\n  File …\nMemoryError\n",
    ],
)
def test_an_error_that_no_fault_explains_is_unexpected(one: str) -> None:
    assert len(list(unexpected(read([one])))) == 1


@pytest.mark.parametrize(
    "one",
    [
        line("batch.retry", error="ConnectionResetError: x"),
        line("writer.not_ready", "error", error="ConnectionRefusedError: x"),
        line("job.failed", "error", exception="Traceback …\nasyncpg.exceptions.AdminShutdownError: x"),
        line("job.failed", "error", exception="Traceback …\nnexhb.errors.LockLost: x"),
        line("job.failed", "error", error="JobFailed: The job did not do all of its work. Its connection was lost: x"),
        line("job.failed", "error", error="JobFailed: 8Z here and 9Z in the database: set the clocks."),
        line("job.failed", "error", error="DatabaseUnavailable: x"),
        line("job.failed", "error", exception="Traceback …\nnexhb.errors.JobFailed: … Its connection was lost: x"),
        line(
            "nightly_maintenance.step_failed",
            "error",
            exception="Traceback …\nasyncpg.exceptions.DiskFullError: x\nHINT:  Check free disk space.",
        ),
        line("writer.not_ready", "error", error="_InDoubt: COMMIT was not answered."),
        line(
            "job.failed",
            "error",
            exception="…\nnexhb.errors.JobFailed: 8Z here and 9Z in the database: set the clocks.",
        ),
        "  a table of a command's\n",
    ],
)
def test_an_error_that_a_fault_explains_is_none(one: str) -> None:
    assert list(unexpected(read([one]))) == []


def test_the_same_error_is_told_once_with_its_number() -> None:
    (said,) = unexpected(read([line("http.unexpected", "error", exception="…\nKeyError: 'x'")] * 7))
    assert said.startswith("7 times")


def test_what_goes_on_behind_the_healing_is_told_and_what_ended_with_it_is_not() -> None:
    entries = list(read(line("devices.listen_lost", at_s=at_s) for at_s in (-3, 1, 6, 11))) + list(
        read([line("batch.retry", at_s=-1), line("batch.retry", at_s=-0.5), line("batch.retry", at_s=0.5)])
    )
    (said,) = repeating(entries, NOON, NOON + timedelta(seconds=12))
    assert "devices.listen_lost" in said
    assert said.startswith("3 times in 12 s")


def test_what_is_allowed_has_its_reason() -> None:
    assert all(rule.reason.endswith(".") for rule in ALLOWED.values())
