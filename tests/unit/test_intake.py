"""The queue between handlers and the writer is limited, settles each ticket once and counts each heartbeat once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import REGISTRY

from nexhb.errors import Overloaded
from nexhb.heartbeat import FieldError
from nexhb.ingest.intake import DEDUPLICATED, WRITTEN, Intake, Outcome, Ticket, Verdict
from nexhb.readiness import Readiness, Source
from tests.conftest import SOON_S
from tests.support.heartbeats import beat

REFUSED = Verdict(Outcome.REFUSED, errors=(FieldError("alias", "cannot be stored"),))


def intake_of(
    max_items: int = 100, max_bytes: int = 100_000, fraction: float = 0.5, readiness: Readiness | None = None
) -> Intake:
    """Return an intake with these limits and a fixed random fraction."""
    readiness = readiness or Readiness()
    return Intake(readiness, max_items=max_items, max_bytes=max_bytes, random_fraction=lambda: fraction)


def ignore(_: list[Verdict]) -> None:
    """Ignore the verdicts."""


def admit(intake: Intake, count: int = 1, size: int = 100) -> list[Ticket]:
    """Admit `count` heartbeats, each as a ticket of its own."""
    return [intake.admit([beat(device_no)], size, ignore) for device_no in range(1, count + 1)]


@dataclass
class Submitted:
    """A ticket with the future of its verdicts."""

    ticket: Ticket
    future: asyncio.Future[list[Verdict]]


def submit(intake: Intake, count: int = 1, size: int = 100) -> list[Submitted]:
    """Submit `count` heartbeats, each as a ticket of its own."""
    futures = [intake.submit([beat(device_no)], size) for device_no in range(1, count + 1)]
    return [Submitted(*pair) for pair in zip(list(intake._unanswered)[-count:], futures, strict=True)]


LEDGER = {
    "ingested": ("heartbeats_ingested_total", {}),
    "written": ("hb_writes_total", {}),
    "deduplicated": ("hb_dedupe_total", {}),
    "refused": ("nexhb_heartbeats_refused_total", {"reason": "database"}),
    "failed": ("nexhb_heartbeats_failed_total", {"reason": "uncommitted"}),
}


def ledger() -> dict[str, float]:
    """Return the current values of the counters."""
    return {column: REGISTRY.get_sample_value(*sample) or 0.0 for column, sample in LEDGER.items()}


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """Return a function that returns by how much each counter grew during the test; counters that did not grow are left
    out."""
    before = ledger()

    def gained() -> dict[str, int]:
        return {name: int(now - before[name]) for name, now in ledger().items() if now != before[name]}

    return gained


# ---- limits -----------------------------------------------------------------------------------------------------


async def test_no_more_heartbeats_are_admitted_than_max_items() -> None:
    intake = intake_of(max_items=3)
    tickets = admit(intake, 3)
    with pytest.raises(Overloaded, match="3 heartbeats"):
        intake.admit([beat()], 1, ignore)
    assert intake.items == 3
    intake.settle(tickets[:1], [WRITTEN])
    intake.admit([beat()], 1, ignore)
    with pytest.raises(Overloaded):
        intake.check()


async def test_heartbeats_in_a_transaction_still_count_towards_the_limit() -> None:
    intake = intake_of(max_items=2)
    admit(intake, 2)
    assert len(intake.next_batch(10)) == 2
    with pytest.raises(Overloaded):
        intake.check()


async def test_nothing_is_admitted_once_max_bytes_are_reached() -> None:
    intake = intake_of(max_bytes=1_000)
    [ticket] = admit(intake, size=999)
    intake.check()
    # The size of a body is known only when it has been read, so the last body may exceed the limit.
    intake.admit([beat()], 50, ignore)
    assert intake.bytes == 1_049
    with pytest.raises(Overloaded, match="1049 bytes"):
        intake.admit([beat()], 1, ignore)
    intake.settle([ticket], [WRITTEN])
    assert intake.bytes == 50
    intake.check()


async def test_a_whole_queue_is_checked_as_one() -> None:
    intake = intake_of(max_items=10)
    admit(intake, 6)
    intake.check(4)
    with pytest.raises(Overloaded):
        intake.check(5)


async def test_a_queue_longer_than_the_limit_is_admitted_if_nothing_waits() -> None:
    intake = intake_of(max_items=3)
    submitted = intake.submit([beat(number) for number in range(5)], 500)
    with pytest.raises(Overloaded, match="5 heartbeats"):
        intake.check()
    intake.settle(intake.next_batch(2), [WRITTEN] * 5)
    assert await submitted == [WRITTEN] * 5


async def test_an_intake_that_refuses_gives_the_reason() -> None:
    readiness = Readiness()
    intake = intake_of(readiness=readiness)
    readiness.block(Source.DATABASE, "The database cannot commit.")
    with pytest.raises(Overloaded, match="cannot commit"):
        intake.admit([beat()], 1, ignore)
    assert intake.items == 0
    readiness.clear(Source.DATABASE)
    admit(intake)


@pytest.mark.parametrize(("fraction", "seconds"), [(0.0, 2), (0.099, 2), (0.1, 3), (0.5, 7), (0.999_999, 11)])
async def test_retry_after_is_2_to_12_seconds(fraction: float, seconds: int) -> None:
    assert intake_of(fraction=fraction).retry_after_s() == seconds


async def test_retry_after_is_spread() -> None:
    intake = Intake(Readiness(), max_items=1, max_bytes=1)
    assert len({intake.retry_after_s() for _ in range(500)}) == 10


# ---- to the writer and back -------------------------------------------------------------------------------------


async def test_each_ticket_is_returned_once_and_in_order() -> None:
    intake = intake_of()
    tickets = admit(intake, 5)
    assert intake.next_batch(2) == tickets[:2]
    assert intake.next_batch(10) == tickets[2:]
    assert intake.next_batch(10) == []
    assert intake.items == 5


async def test_a_ticket_that_is_already_settled_is_not_returned() -> None:
    intake = intake_of()
    tickets = admit(intake, 3)
    intake.settle(tickets[1:2], [WRITTEN])
    assert intake.next_batch(10) == [tickets[0], tickets[2]]


async def test_each_ticket_receives_its_own_verdict() -> None:
    intake = intake_of()
    submitted = submit(intake, 3)
    intake.settle(intake.next_batch(10), [WRITTEN, DEDUPLICATED, REFUSED])
    assert [await one.future for one in submitted] == [[WRITTEN], [DEDUPLICATED], [REFUSED]]
    assert (intake.items, intake.bytes) == (0, 0)


async def test_heartbeats_submitted_together_are_admitted_written_and_settled_together(
    counted: Callable[[], dict[str, int]],
) -> None:
    intake = intake_of(max_items=6)
    first = intake.submit([beat(1), beat(2), beat(3)], 300)
    second = intake.submit([beat(4), beat(5)], 200)
    with pytest.raises(Overloaded, match="5 heartbeats"):
        intake.submit([beat(6), beat(7)], 1)  # one of the two heartbeats would fit; neither is admitted
    assert (intake.items, intake.bytes) == (5, 500)
    [three] = intake.next_batch(4)  # a ticket is not split …
    assert len(three.heartbeats) == 3
    [two] = intake.next_batch(1)  # … and a ticket larger than the batch is returned alone
    intake.settle([two, three], [WRITTEN, REFUSED, DEDUPLICATED, WRITTEN, WRITTEN])
    assert await first == [DEDUPLICATED, WRITTEN, WRITTEN]
    assert await second == [WRITTEN, REFUSED]
    assert (intake.items, intake.bytes) == (0, 0)
    assert counted() == {"written": 3, "deduplicated": 1, "refused": 1}


async def test_a_failing_callback_does_not_keep_the_verdicts_from_other_tickets(
    counted: Callable[[], dict[str, int]],
) -> None:
    def fail(_: list[Verdict]) -> None:
        raise RuntimeError("the transport is closed")

    intake = intake_of()
    intake.admit([beat(1)], 100, fail)
    future = intake.submit([beat(2)], 100)
    intake.settle(intake.next_batch(10), [WRITTEN, WRITTEN])
    assert await future == [WRITTEN]
    assert intake.items == 0
    assert counted() == {"written": 2}


async def test_verdicts_that_do_not_match_their_tickets_are_a_bug() -> None:
    intake = intake_of()
    with pytest.raises(ValueError, match="differs from"):
        intake.settle(admit(intake, 2), [WRITTEN])


async def test_the_first_of_two_verdicts_counts_and_is_counted_once(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    [submitted] = submit(intake, size=70)
    intake.fail([submitted.ticket], "not committed in time")
    intake.settle([submitted.ticket], [WRITTEN])
    assert await submitted.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert (intake.items, intake.bytes) == (0, 0)
    assert counted() == {"failed": 1}


async def test_a_cancelled_handler_leaves_no_ticket(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    submitted = submit(intake, 2)
    submitted[0].future.cancel()
    intake.settle(intake.next_batch(10), [WRITTEN, WRITTEN])
    assert submitted[0].future.cancelled()
    assert await submitted[1].future == [WRITTEN]
    assert intake.items == 0
    assert counted() == {"written": 2}


async def test_a_wait_ends_with_a_ticket_a_wake_or_the_timeout() -> None:
    intake = intake_of()
    for end_wait in (lambda: admit(intake), intake.wake):
        intake.next_batch(10)
        waiting = asyncio.create_task(intake.wait(3600))
        await asyncio.sleep(0)
        assert not waiting.done()
        end_wait()
        await asyncio.wait_for(waiting, SOON_S)
    admit(intake)
    await asyncio.wait_for(intake.wait(3600), SOON_S)  # a ticket is queued, so `wait` returns at once
    intake.next_batch(10)
    await asyncio.wait_for(intake.wait(0.001), SOON_S)


# ---- heartbeats that are not committed
# --------------------------------------------------------------------------------------


async def test_only_tickets_that_waited_too_long_are_failed() -> None:
    intake = intake_of()
    old, young = submit(intake, 2)
    began = old.ticket.admitted_at
    young.ticket.admitted_at = began + 5
    intake.next_batch(1)  # the old ticket is in a transaction, the young one is queued; both can expire
    intake.expire(began + 10, 10)
    assert not old.future.done()
    intake.expire(began + 10.001, 10)
    assert await old.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert not young.future.done()
    assert intake.items == 1
    intake.expire(began + 15.001, 10)
    assert await young.future == [Verdict(Outcome.FAILED, "not committed in time")]
    assert intake.next_batch(10) == []


async def test_every_unanswered_ticket_is_failed_when_the_daemon_stops(counted: Callable[[], dict[str, int]]) -> None:
    intake = intake_of()
    submitted = submit(intake, 3)
    intake.next_batch(1)
    intake.fail_all("the daemon stops")
    assert [await one.future for one in submitted] == [[Verdict(Outcome.FAILED, "the daemon stops")]] * 3
    assert intake.next_batch(10) == []
    assert counted() == {"failed": 3}


async def test_the_intake_is_idle_once_every_admitted_ticket_is_settled() -> None:
    intake = intake_of()
    await asyncio.wait_for(intake.wait_idle(), SOON_S)
    tickets = admit(intake, 2)
    idle = asyncio.create_task(intake.wait_idle())
    intake.settle(intake.next_batch(1), [WRITTEN])
    await asyncio.sleep(0)
    assert not idle.done()
    intake.settle(tickets, [WRITTEN, WRITTEN])
    await asyncio.wait_for(idle, SOON_S)


# ---- the ledger -------------------------------------------------------------------------------------------------


async def test_every_received_heartbeat_is_counted_as_written_deduplicated_refused_or_failed(
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


async def test_received_heartbeats_are_counted_once_however_often_they_are_observed(
    counted: Callable[[], dict[str, int]],
) -> None:
    intake = intake_of()
    intake.received += 2
    intake.observe()
    intake.observe()
    intake.received += 1
    intake.observe()
    assert counted() == {"ingested": 3}


async def test_settled_tickets_do_not_make_the_queue_grow() -> None:
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
    assert len(intake.next_batch(3)) == 3


@pytest.mark.parametrize("limit", ["readiness", "max_items", "max_bytes"])
async def test_has_room_agrees_with_check(limit: str) -> None:
    """`has_room` and `check` must agree: the fast path uses the first, and the handlers of aiohttp the second."""
    readiness = Readiness()
    intake = intake_of(max_items=2, max_bytes=150, readiness=readiness)
    assert intake.has_room
    if limit.startswith("max"):
        [ticket] = admit(intake, size=150 if limit == "max_bytes" else 1)
        if limit == "max_items":
            admit(intake)
    else:
        readiness.block(Source.DATABASE, "The database cannot commit.")
    had_room = intake.has_room
    with pytest.raises(Overloaded):
        intake.check()
    if limit.startswith("max"):
        intake.settle([ticket], [WRITTEN])
    else:
        readiness.clear(Source.DATABASE)
    intake.check()
    assert [had_room, intake.has_room] == [False, True]


async def test_a_wait_that_a_ticket_ends_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load there are thousands of waits within the timeout of a single wait."""
    intake, loop = intake_of(), asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def record(*args: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", record)
    waiting = asyncio.create_task(intake.wait(3600))
    await asyncio.sleep(0)
    admit(intake)
    await waiting
    assert [timer.cancelled() for timer in timers] == [True]
