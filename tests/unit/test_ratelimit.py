"""Who comes too often: an allowance a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexhb import ratelimit
from nexhb.http import pace
from nexhb.ratelimit import Allowance


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    allowance = Allowance(burst=5, per_second=2)
    assert [allowance.take("a", 100.0) for _ in range(5)] == [0.0] * 5
    assert allowance.take("a", 100.0) == pytest.approx(0.5)
    assert allowance.take("a", 100.5) == 0.0
    assert allowance.take("a", 100.5) > 0


def test_each_key_has_its_own() -> None:
    allowance = Allowance(burst=1, per_second=1)
    assert allowance.take("a", 0.0) == allowance.take("b", 0.0) == 0.0
    assert allowance.take("a", 0.0) > 0


def test_what_is_refused_costs_nothing() -> None:
    allowance = Allowance(burst=2, per_second=1)
    assert allowance.take("a", 0.0, 2) == 0.0
    for _ in range(1000):
        assert allowance.take("a", 0.0) > 0
    assert allowance.take("a", 1.0) == 0.0


def test_spent_is_what_would_be_refused() -> None:
    allowance = Allowance(burst=1, per_second=1)
    assert not allowance.is_spent("a", 0.0)
    allowance.take("a", 0.0)
    assert allowance.is_spent("a", 0.0)
    assert not allowance.is_spent("a", 1.0)


def test_memory_is_bounded_by_forgetting_who_owes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratelimit, "HELD", 10)
    allowance = Allowance(burst=1, per_second=1)
    allowance.take("spent", 100.0)
    for number in range(9):
        allowance.take(number, 50.0)
    allowance.take("new", 100.0)
    assert allowance.is_spent("spent", 100.0)
    for number in range(100):
        allowance.take(f"flood {number}", 100.0)
    assert len(allowance._used_up_to) <= 10


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 4)), max_size=60))
def test_no_more_is_allowed_than_the_burst_and_the_rate(calls: list[tuple[float, int]]) -> None:
    allowance, now, allowed = Allowance(burst=10, per_second=3), 0.0, 0
    for pause, amount in calls:
        now += pause
        if not allowance.take("a", now, amount):
            allowed += amount
        assert allowed <= 10 + 3 * now + 1e-6


# ---- the pace of the fleet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_calm_queue_asks_for_the_usual_interval(fraction: float) -> None:
    assert pace.interval_s(60, 600, 0.0, fraction) == pace.interval_s(60, 600, pace.CALM, fraction) == 60


def test_a_filling_queue_slows_the_fleet_down_and_spreads_it() -> None:
    half = [pace.interval_s(60, 600, 0.5, n / 10) for n in range(11)]
    full = [pace.interval_s(60, 600, 1.0, n / 10) for n in range(11)]
    assert 60 < sum(half) / 11 < sum(full) / 11
    assert len(set(half)) > 5
    assert len(set(full)) > 5
    assert max(full) == 240


@given(st.integers(1, 900), st.integers(1, 3600), st.floats(0, 2), st.floats(0, 1))
def test_nobody_is_asked_to_look_offline(usual_s: int, offline_s: int, filled: float, fraction: float) -> None:
    asked = pace.interval_s(usual_s, offline_s, filled, fraction)
    assert usual_s <= asked <= max(usual_s, offline_s // 2)


# ---- the pace of refusals -----------------------------------------------------------------------------------------


def test_a_few_refusals_are_heard_at_once_and_the_others_one_after_another() -> None:
    turns = pace.Turns(per_s=10, at_once=3, within_s=5)
    assert [turns.wait_s(100.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    # what was waited for is over, and a quiet while gives the first ones back
    assert turns.wait_s(100.2) == pytest.approx(0.1)
    assert turns.wait_s(200.0) == 0.0


def test_nobody_waits_longer_for_a_refusal_than_the_bound() -> None:
    turns = pace.Turns(per_s=10, at_once=3, within_s=5)
    waits = [turns.wait_s(100.0) for _ in range(1000)]
    assert max(waits) == pytest.approx(5)
    # nor do those who come after them
    assert turns.wait_s(101.0) == pytest.approx(4.1)


@given(st.lists(st.floats(0, 2), max_size=80))
def test_turns_are_as_many_as_said(pauses: list[float]) -> None:
    turns, now, at = pace.Turns(per_s=10, at_once=3, within_s=1e9), 0.0, []
    for pause in pauses:
        now += pause
        at.append(now + turns.wait_s(now))
    for first in range(len(at)):
        within = [each for each in at[first:] if each <= at[first] + 1]
        assert len(within) <= 10 + 3 + 1
