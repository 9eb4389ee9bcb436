"""The pure parts of the runs overload and outage: when sends are due, seconds, recovery, what agents held."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import pytest

from bench.fleet import MICROS
from bench.load import Record, Stage
from bench.load.flood import due_us, next_heartbeat_s
from bench.report import SendLog
from bench.runs.outage import held_and_drained
from bench.runs.overload import Second, by_second, recovered_s, spans
from bench.scenarios import OVERLOAD


def test_each_stage_sends_at_its_rate_and_in_order() -> None:
    due = due_us((Stage("easy", 10, 3), Stage("hard", 200, 2), Stage("easy", 10, 1)), seed=1)
    assert list(due) == sorted(due)
    seconds = Counter(at // MICROS for at in due)
    assert [seconds[second] for second in range(7)] == [10, 10, 10, 200, 200, 10, 0]
    assert due != due_us((Stage("easy", 10, 3), Stage("hard", 200, 2), Stage("easy", 10, 1)), seed=2)


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (b'{"ok":true,"next_heartbeat_seconds":60,"deduplicated":false}', 60),
        (b'{"ok": true, "next_heartbeat_seconds": 214}', 214),
        (b'{"ok":true}', 0),
        (b"", 0),
    ],
)
def test_what_a_device_is_told_is_read_from_the_answer(body: bytes, seconds: int) -> None:
    assert next_heartbeat_s(body) == seconds


def record_of(*sends: tuple[float, float, int, int], held_back: tuple[float, ...] = ()) -> Record:
    """A record of sends: due at (s), took (s), status, told (s)."""
    return Record(
        due_us=array("q", [round(due_s * MICROS) for due_s, _, _, _ in sends]),
        took_s=array("f", [took_s for _, took_s, _, _ in sends]),
        status=array("h", [status for _, _, status, _ in sends]),
        told_s=array("h", [told_s for _, _, _, told_s in sends]),
        held_back_us=array("q", [round(due_s * MICROS) for due_s in held_back]),
    )


def test_a_send_belongs_to_the_second_in_which_it_was_due() -> None:
    record = record_of(
        (0.1, 3.0, 200, 60), (0.9, 0.5, 503, 7), (1.0, 0.25, 200, 240), (1.5, math.nan, 0, 0), held_back=(1.7, 9.0)
    )
    first, second, third = by_second(record, 3)
    assert (first.sent, first.statuses, first.retry_after_s) == (2, Counter({200: 1, 503: 1}), Counter({7: 1}))
    assert (list(first.accepted_s), list(first.refused_s), list(first.next_s)) == ([3.0], [0.5], [60])
    assert (second.statuses, second.held_back, list(second.next_s)) == (Counter({200: 1, 0: 1}), 1, [240])
    # what was due behind the end is in the last second
    assert (third.sent, third.held_back) == (0, 1)


def calm(took_s: float = 0.01, status: int = 200, held_back: int = 0) -> Second:
    """A second with one send."""
    [second] = by_second(record_of((0.0, took_s, status, 60)), 1)
    second.held_back = held_back
    return second


def test_full_service_is_three_calm_seconds_in_a_row() -> None:
    assert recovered_s([calm(), calm(), calm()], 150) == 0
    assert recovered_s([calm(0.2), calm(), calm(status=503), calm(), calm(), calm(), calm(0.2)], 150) == 3
    assert recovered_s([calm(), calm(), calm(held_back=1), calm(), calm()], 150) is None
    assert recovered_s([Second(), Second(), Second()], 150) is None


def test_the_search_and_the_flood_have_buckets_of_their_own_and_enough_of_them() -> None:
    first, second = spans(OVERLOAD, 2000)
    assert first.end_us == second.first_us
    assert first.buckets * 2000 >= 25_000 * OVERLOAD.capacity_s
    assert second.buckets * 2000 >= 25_000 * 2 * OVERLOAD.overload_s


def test_held_is_what_was_made_before_the_return_and_acknowledged_only_then() -> None:
    # the run began 4 s into its bucket: what is stamped 10 s was made at 14 s
    began_at_s, back_s, sends = 1_000_000_004.0, 1_000_000_100.0, SendLog()
    for second in (10, 50, 95, 96, 120):
        sends.add(0, (1_000_000_000 + second) * MICROS)
    acked_s = [1_000_000_014.1, 1_000_000_130.0, 1_000_000_101.5, 1_000_000_103.0, 1_000_000_124.1]
    assert held_and_drained(sends, acked_s, began_at_s, back_s) == [1.5, 30.0]
    # one that never was acknowledged, with an answer to a later one or without
    assert held_and_drained(sends, acked_s[:1], began_at_s, back_s) == [math.inf, math.inf]
    assert held_and_drained(sends, [acked_s[0], math.nan, *acked_s[2:]], began_at_s, back_s) == [1.5, math.inf]
