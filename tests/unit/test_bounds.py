"""Limits on memory, log lines and connections: no response or stored row would show that one is exceeded."""

from __future__ import annotations

import io
import resource

import orjson
import pytest

from nexhb import log
from nexhb.devices.store import Device
from nexhb.http.device_api import admission
from nexhb.ingest import writer
from nexhb.ingest.intake import Intake
from nexhb.ingest.writer import Writer
from nexhb.open_files import RESERVED_FILES, connection_limit
from nexhb.postgres.connections import Database
from nexhb.rate_limit import RateLimiter
from nexhb.readiness import Readiness


@pytest.fixture
def lines() -> io.StringIO:
    """Return what is logged."""
    lines = io.StringIO()
    log.setup("info", lines)
    return lines


def events(lines: io.StringIO, event: str) -> list[dict[str, object]]:
    """Return the log lines with this event."""
    events = [orjson.loads(line) for line in lines.getvalue().splitlines()]
    return [each for each in events if each["event"] == event]


async def test_a_lasting_failure_is_logged_each_time_but_with_a_traceback_only_a_few_times(lines: io.StringIO) -> None:
    readiness = Readiness()
    intake = Intake(readiness, max_items=1, max_bytes=1)
    failing = Writer(Database("postgresql://nobody@127.0.0.1:1/none"), intake, readiness, batch_max=1)
    for number in range(1, 9):
        try:
            int("odd")
        except ValueError as error:
            failing._handle_unexpected_failure(error, 1)
        assert readiness.is_ready == (number < writer.MAX_UNEXPECTED_FAILURES)
    logged = events(lines, "batch.failed_unexpectedly")
    assert len(logged) == 8
    assert ["Traceback" in str(one) for one in logged] == [True] * 3 + [False] * 5


def test_a_foreign_device_id_is_logged_once_per_device_and_for_a_limited_number_of_devices(
    lines: io.StringIO,
) -> None:
    logged = set(range(9_998))
    for number in (20_000, 20_000, 20_001, 20_002, 20_003):
        admission._report_mismatch(logged, Device(number, f"kiosk-{number}", revoked=False), "another")
    device_ids = [line["device_id"] for line in events(lines, "heartbeat.device_id_mismatch")]
    assert device_ids == ["kiosk-20000", "kiosk-20001"]
    assert len(logged) == 10_000


@pytest.mark.parametrize(
    ("open_files", "wanted", "most"),
    [
        (1024, 10_000, 1024 - RESERVED_FILES),
        (1024, 100, 100),
        (200, 10_000, 10),
        (resource.RLIM_INFINITY, 9, 9),
    ],
)
def test_client_connections_leave_file_descriptors_for_the_daemon(
    monkeypatch: pytest.MonkeyPatch, open_files: int, wanted: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (open_files, open_files))
    assert connection_limit(wanted) == most


def test_returned_permits_can_be_acquired_again_and_create_no_key() -> None:
    limiter = RateLimiter(burst=3, per_second=0.001)
    assert limiter.acquire("a", 0.0, 3).allowed
    assert limiter.is_exhausted("a", 0.0)
    limiter.give_back("a", 2)
    assert [limiter.acquire("a", 0.0).allowed for _ in range(3)] == [True, True, False]
    limiter.give_back("never seen")
    assert limiter._used_up_to.keys() == {"a"}
