"""The queue between handlers and the writer: bounded, every ticket answered once, every heartbeat counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import REGISTRY

from nexhb.errors import Overloaded
from nexhb.intake import DEDUPLICATED, WRITTEN, Intake, Outcome, Ticket, Verdict
from nexhb.wire import FieldError
from tests.conftest import SOON_S
from tests.unit.beats import beat

REFUSED = Verdict(Outcome.REFUSED, errors=(FieldError("alias", "cannot be stored"),))


def intake_of(max_items: int = 100, max_bytes: int = 100_000, fraction: float = 0.5) -> Intake:
    """An intake with its bounds; chance is what the test says."""
    return Intake(max_items=max_items, max_bytes=max_bytes, random_fraction=lambda: fraction)


def nobody(_: list[Verdict]) -> None:
    """Does not care."""


def admit(intake: Intake, count: int = 1, size: int = 100) -> list[Ticket]:
    """So many heartbeats, each of its own."""
    return [intake.admit([beat(device_no)], size, nobody) for device_no in range(1, count + 1)]


@dataclass
class Asked:
    """Heartbeats of which somebody awaits the verdicts."""

    ticket: Ticket
    future: asyncio.Future[list[Verdict]]


def ask(intake: Intake, count: int = 1, size: int = 100) -> list[Asked]:
    """So many heartbeats, each of its own, and their verdicts to come."""
    futures = [intake.ask([beat(device_no)], size) for device_no in range(1, count + 1)]
    return [Asked(*pair) for pair in zip(list(intake._unanswered)[-count:], futures, strict=True)]


LEDGER = {
    "ingested": ("heartbeats_ingested_total", {}),
    "written": ("hb_writes_total", {}),
    "deduplicated": ("hb_dedupe_total", {}),
    "refused": ("nexhb_heartbeats_refused_total", {"reason": "database"}),
    "failed": ("nexhb_heartbeats_failed_total", {"reason": "uncommitted"}),
}


def ledger() -> dict[str, float]:
    """The counters as they stand."""
    return {column: REGISTRY.get_sample_value(*sample) or 0.0 for column, sample in LEDGER.items()}


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """What the ledger gained since the test began, without the columns that gained nothing."""
    before = ledger()

    def gained() -> dict[str, int]:
        return {name: int(now - before[name]) for name, now in ledger().items() if now != before[name]}

    return gained


# ---- bounds -----------------------------------------------------------------------------------------------------


async def test_so_many_heartbeats_are_admitted_and_not_one_more() -> None:
    intake = intake_of(max_items=3)
    tickets = admit(intake, 3)
    with pytest.raises(Overloaded, match="3 heartbeats"):
        intake.admit([beat()], 1, nobody)
    assert intake.items == 3
    intake.settle(tickets[:1], [WRITTEN])
    intake.admit([beat()], 1, nobody)
    with pytest.raises(Overloaded):
        intake.check()


async def test_what_the_writer_took_and_did_not_answer_still_counts() -> None:
    intake = intake_of(max_items=2)
    admit(intake, 2)
    assert len(intake.take(10)) == 2
    with pytest.raises(Overloaded):
        intake.check()


async def test_so_many_bytes_are_admitted_and_over_them_nothing() -> None:
    intake = intake_of(max_bytes=1_000)
    [ticket] = admit(intake, size=999)
    intake.check()
    # A body's size is known only when it is read: the last one may reach over the bound.
    intake.admit([beat()], 50, nobody)
    assert intake.bytes == 1_049
    with pytest.raises(Overloaded, match="1049 bytes"):
        intake.admit([beat()], 1, nobody)
    intake.settle([ticket], [WRITTEN])
    assert intake.bytes == 50
    intake.check()


async def test_a_whole_queue_is_checked_as_one() -> None:
    intake = intake_of(max_items=10)
    admit(intake, 6)
    intake.check(4)
    with pytest.raises(Overloaded):
        intake.check(5)


async def test_a_queue_longer_than_the_bound_is_admitted_where_nothing_waits() -> None:
    intake = intake_of(max_items=3)
    asked = intake.ask([beat(number) for number in range(5)], 500)
    with pytest.raises(Overloaded, match="5 heartbeats"):
        intake.check()
    intake.settle(intake.take(2), [WRITTEN] * 5)
    assert await asked == [WRITTEN] * 5


async def test_a_closed_intake_admits_nothing_and_says_why() -> None:
    intake = intake_of()
    intake.closed_because = "The database cannot commit."
    with pytest.raises(Overloaded, match="cannot commit"):
        intake.admit([beat()], 1, nobody)
    assert intake.items == 0
    intake.closed_because = ""
    admit(intake)


@pytest.mark.parametrize(("fraction", "seconds"), [(0.0, 2), (0.099, 2), (0.1, 3), (0.5, 7), (0.999_999, 11)])
async def test_devices_are_asked_back_in_2_to_12_seconds(fraction: float, seconds: int) -> None:
    assert intake_of(fraction=fraction).retry_after_s() == seconds


async def test_devices_are_not_asked_back_all_at_once() -> None:
    intake = Intake(max_items=1, max_bytes=1)
    assert len({intake.retry_after_s() for _ in range(500)}) == 10


# ---- to the writer and back -------------------------------------------------------------------------------------


async def test_tickets_are_taken_in_their_order_and_each_once() -> None:
    intake = intake_of()
    tickets = admit(intake, 5)
    assert intake.take(2) == tickets[:2]
    assert intake.take(10) == tickets[2:]
    assert intake.take(10) == []
    assert intake.items == 5


async def test_a_ticket_answered_meanwhile_is_not_taken() -> None:
    intake = intake_of()
    tickets = admit(intake, 3)
    intake.settle(tickets[1:2], [WRITTEN])
    assert intake.take(10) == [tickets[0], tickets[2]]


async def test_each_ticket_hears_its_own_verdict() -> None:
    intake = intake_of()
    asked = ask(intake, 3)
    intake.settle(intake.take(10), [WRITTEN, DEDUPLICATED, REFUSED])
    assert [await one.future for one in asked] == [[WRITTEN], [DEDUPLICATED], [REFUSED]]
    assert (intake.items, intake.bytes) == (0, 0)


async def test_heartbeats_that_came_together_are_admitted_taken_and_answered_together(
    counted: Callable[[], dict[str, int]],
) -> None:
    intake = intake_of(max_items=6)
    first = intake.ask([beat(1), beat(2), beat(3)], 300)
    second = intake.ask([beat(4), beat(5)], 200)
    with pytest.raises(Overloaded, match="5 heartbeats"):
        intake.ask([beat(6), beat(7)], 1)  # one of them would fit: none of them is in
    assert (intake.items, intake.bytes) == (5, 500)
    [taken] = intake.take(4)  # a ticket is not divided …
    assert len(taken.heartbeats) == 3
    [other] = intake.take(1)  # … and one that is larger than what is asked for stands alone
    intake.settle([other, taken], [WRITTEN, REFUSED, DEDUPLICATED, WRITTEN, WRITTEN])
    assert await first == [DEDUPLICATED, WRITTEN, WRITTEN]
    assert await second == [WRITTEN, REFUSED]
    assert (intake.items, intake.bytes) == (0, 0)
    assert counted() == {"written": 3, "deduplicated": 1, "refused": 1}


async def test_one_who_cannot_be_told_keeps_the_verdict_from_nobody(counted: Callable[[], dict[str, int]]) -> None:
    def deaf(_: list[Verdict]) -> None:
        raise RuntimeError("the transport is closed")

    intake = intake_of()
    intake.admit([beat(1)], 100, deaf)
    told = intake.ask([beat(2)], 100)
    intake.settle(intake.take(10), [WRITTEN, WRITTEN])
    assert await told == [WRITTEN]
    assert intake.items == 0
    assert counted() == {"written": 2}


async def test_verdicts_that_do_not_match_their_tickets_are_a_bug() -> None:
    intake = intake_of()
    with pytest.raises(ValueError, match="do not match"):
        intake.settle(admit(intake, 2), [WRITTEN])


async def test_of_two_verdicts_the_first_counts_and_is_counted_once(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    [asked] = ask(intake, size=70)
    intake.fail([asked.ticket], "not committed in time")
    intake.settle([asked.ticket], [WRITTEN])
    assert await asked.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert (intake.items, intake.bytes) == (0, 0)
    assert counted() == {"failed": 1}


async def test_a_handler_that_went_away_leaves_no_ticket_behind(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    asked = ask(intake, 2)
    asked[0].future.cancel()
    intake.settle(intake.take(10), [WRITTEN, WRITTEN])
    assert asked[0].future.cancelled()
    assert await asked[1].future == [WRITTEN]
    assert intake.items == 0
    assert counted() == {"written": 2}


async def test_waiting_ends_with_a_ticket_with_a_wake_and_with_its_time() -> None:
    intake = intake_of()
    for rouse in (lambda: admit(intake), intake.wake):
        intake.take(10)
        waiting = asyncio.create_task(intake.wait(3600))
        await asyncio.sleep(0)
        assert not waiting.done()
        rouse()
        await asyncio.wait_for(waiting, SOON_S)
    admit(intake)
    await asyncio.wait_for(intake.wait(3600), SOON_S)  # something waits: no wait at all
    intake.take(10)
    await asyncio.wait_for(intake.wait(0.001), SOON_S)


# ---- what is not committed --------------------------------------------------------------------------------------


async def test_what_waited_too_long_is_failed_and_the_rest_is_not() -> None:
    intake = intake_of()
    old, young = ask(intake, 2)
    began = old.ticket.admitted_at
    young.ticket.admitted_at = began + 5
    intake.take(1)  # the old one is in a transaction, the young one is queued: both are somebody's wait
    intake.expire(began + 10, 10)
    assert not old.future.done()
    intake.expire(began + 10.001, 10)
    assert await old.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert not young.future.done()
    assert intake.items == 1
    intake.expire(began + 15.001, 10)
    assert await young.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert intake.take(10) == []


async def test_on_the_way_out_everything_unanswered_is_failed(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    asked = ask(intake, 3)
    intake.take(1)
    intake.fail_all("the daemon stops")
    assert [await one.future for one in asked] == [[Verdict(Outcome.FAILED, "the daemon stops")]] * 3
    assert intake.take(10) == []
    assert counted() == {"failed": 3}


async def test_it_is_idle_when_everything_admitted_is_answered() -> None:
    intake = intake_of()
    await asyncio.wait_for(intake.idle(), SOON_S)
    tickets = admit(intake, 2)
    idle = asyncio.create_task(intake.idle())
    intake.settle(intake.take(1), [WRITTEN])
    await asyncio.sleep(0)
    assert not idle.done()
    intake.settle(tickets, [WRITTEN, WRITTEN])
    await asyncio.wait_for(idle, SOON_S)


# ---- the ledger -------------------------------------------------------------------------------------------------


async def test_received_is_written_and_deduplicated_and_refused_and_failed(
    counted: Callable[[], dict[str, int]],
) -> None:
    intake = intake_of(max_items=6)
    intake.received += 6
    tickets = admit(intake, 6)
    intake.settle(tickets[:4], [WRITTEN, WRITTEN, DEDUPLICATED, REFUSED])
    intake.fail(tickets[4:5], "the database cannot commit")
    intake.observe()
    assert REGISTRY.get_sample_value("nexhb_intake_items") == 1
    assert REGISTRY.get_sample_value("nexhb_intake_bytes") == 100
    intake.settle(tickets[5:], [DEDUPLICATED])
    intake.observe()
    assert counted() == {"ingested": 6, "written": 2, "deduplicated": 2, "refused": 1, "failed": 1}
    assert REGISTRY.get_sample_value("nexhb_intake_items") == 0


async def test_what_was_received_is_counted_once_however_often_it_is_observed(
    counted: Callable[[], dict[str, int]],
) -> None:
    intake = intake_of()
    intake.received += 2
    intake.observe()
    intake.observe()
    intake.received += 1
    intake.observe()
    assert counted() == {"ingested": 3}


async def test_the_queue_does_not_grow_by_what_is_answered_already() -> None:
    intake = intake_of(max_items=10)
    now = asyncio.get_running_loop().time()
    for _ in range(3):
        admit(intake, 10)
        intake.expire(now + 1000, after_s=1)
        assert not intake.has_waiting
    admit(intake, 10)
    intake.fail_all("the daemon stops")
    assert not intake.has_waiting
    admit(intake, 3)
    assert len(intake.take(3)) == 3


@pytest.mark.parametrize("why", ["closed_because", "held_because", "max_items", "max_bytes"])
async def test_whether_there_is_room_is_said_as_it_is_checked(why: str) -> None:
    """`has_room` is what the fast path asks, `check` what aiohttp's way asks."""
    intake = intake_of(max_items=2, max_bytes=150)
    assert intake.has_room
    if why.startswith("max"):
        [ticket] = admit(intake, size=150 if why == "max_bytes" else 1)
        if why == "max_items":
            admit(intake)
    else:
        setattr(intake, why, "The database cannot commit.")
    found = [intake.has_room]
    with pytest.raises(Overloaded):
        intake.check()
    if why.startswith("max"):
        intake.settle([ticket], [WRITTEN])
    else:
        setattr(intake, why, "")
    intake.check()
    assert [*found, intake.has_room] == [False, True]


async def test_a_wait_that_a_ticket_ended_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load there are thousands of waits in the time that one may last."""
    intake, loop = intake_of(), asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def noted(*args: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", noted)
    waiting = asyncio.create_task(intake.wait(3600))
    await asyncio.sleep(0)
    admit(intake)
    await waiting
    assert [timer.cancelled() for timer in timers] == [True]
