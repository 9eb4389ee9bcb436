"""What is bounded, by how much of it there is: the results are the same without the bound."""

from __future__ import annotations

import io
import resource

import orjson
import pytest

from nexhb import daemon, log, writer
from nexhb.db import Database
from nexhb.devices import Device
from nexhb.http import heartbeats
from nexhb.intake import Intake
from nexhb.ratelimit import Allowance
from nexhb.writer import Writer


@pytest.fixture
def lines() -> io.StringIO:
    """What is logged."""
    lines = io.StringIO()
    log.setup("info", lines)
    return lines


def events(lines: io.StringIO, event: str) -> list[dict[str, object]]:
    """Those of one name."""
    found = [orjson.loads(line) for line in lines.getvalue().splitlines()]
    return [one for one in found if one["event"] == event]


async def test_a_failure_that_lasts_is_logged_each_time_and_traced_a_few_times(lines: io.StringIO) -> None:
    intake = Intake(max_items=1, max_bytes=1)
    failing = Writer(Database("postgresql://nobody@127.0.0.1:1/none"), intake, batch_max=1)
    for number in range(1, 9):
        try:
            int("odd")
        except ValueError as error:
            await failing._not_foreseen(error, 1)
        assert bool(intake.failing_because) == (number >= writer.UNFORESEEN_MOST)
    said = events(lines, "batch.failed_unexpectedly")
    assert len(said) == 8
    assert ["Traceback" in str(one) for one in said] == [True] * 3 + [False] * 5


def test_a_kiosk_that_calls_itself_otherwise_is_logged_once_and_not_for_ever_many(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = set(range(9_998))
    monkeypatch.setattr(heartbeats, "_mismatch_logged", logged)
    for number in (20_000, 20_000, 20_001, 20_002, 20_003):
        heartbeats._note_mismatch(Device(number, f"kiosk-{number}", revoked=False), "another")
    said = [one["device_id"] for one in events(lines, "heartbeat.device_id_mismatch")]
    assert said == ["kiosk-20000", "kiosk-20001"]
    assert len(logged) == 10_000


@pytest.mark.parametrize(
    ("open_files", "wanted", "most"),
    [(1024, 10_000, 1024 - daemon.OWN_FILES), (1024, 100, 100), (200, 10_000, 10), (resource.RLIM_INFINITY, 9, 9)],
)
def test_clients_leave_open_files_for_the_daemons_own(
    monkeypatch: pytest.MonkeyPatch, open_files: int, wanted: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (open_files, open_files))
    assert daemon.connections_most(wanted) == most


def test_what_is_given_back_may_be_taken_again_once_and_is_remembered_of_nobody() -> None:
    allowance = Allowance(burst=3, per_second=0.001)
    assert allowance.take("a", 0.0, 3) == 0.0
    assert allowance.is_spent("a", 0.0)
    allowance.give_back("a", 2)
    assert [allowance.take("a", 0.0) > 0 for _ in range(3)] == [False, False, True]
    allowance.give_back("never seen")
    assert allowance._used_up_to.keys() == {"a"}
