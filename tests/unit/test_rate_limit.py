"""The rate limiter, and the backpressure on the fleet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexhb import rate_limit
from nexhb.http.device_api import backpressure
from nexhb.rate_limit import RateLimiter


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    limiter = RateLimiter(burst=5, per_second=2)
    assert all(limiter.acquire("a", 100.0) == (True, 0.0) for _ in range(5))
    refused = limiter.acquire("a", 100.0)
    assert not refused.allowed
    assert refused.retry_after_s == pytest.approx(0.5)
    assert limiter.acquire("a", 100.5).allowed
    assert not limiter.acquire("a", 100.5).allowed


def test_each_key_has_its_own_limit() -> None:
    limiter = RateLimiter(burst=1, per_second=1)
    assert limiter.acquire("a", 0.0).allowed
    assert limiter.acquire("b", 0.0).allowed
    assert not limiter.acquire("a", 0.0).allowed


def test_a_refused_call_uses_no_permits() -> None:
    limiter = RateLimiter(burst=2, per_second=1)
    assert limiter.acquire("a", 0.0, 2).allowed
    assert not any(limiter.acquire("a", 0.0).allowed for _ in range(1000))
    assert limiter.acquire("a", 1.0).allowed


def test_reading_the_wait_uses_no_permits() -> None:
    limiter = RateLimiter(burst=2, per_second=1)
    assert [limiter.retry_after_s("a", 0.0, 2) for _ in range(9)] == [0.0] * 9
    assert limiter.retry_after_s("a", 0.0, 5) == pytest.approx(3)
    assert limiter.acquire("a", 0.0, 2).allowed


def test_a_key_is_exhausted_while_a_call_would_be_refused() -> None:
    limiter = RateLimiter(burst=1, per_second=1)
    assert not limiter.is_exhausted("a", 0.0)
    limiter.acquire("a", 0.0)
    assert limiter.is_exhausted("a", 0.0)
    assert not limiter.is_exhausted("a", 1.0)


def test_the_number_of_keys_in_memory_is_limited_and_idle_keys_are_removed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rate_limit, "MAX_KEYS", 10)
    limiter = RateLimiter(burst=1, per_second=1)
    limiter.acquire("exhausted", 100.0)
    for number in range(9):
        limiter.acquire(number, 50.0)
    limiter.acquire("new", 100.0)
    assert limiter.is_exhausted("exhausted", 100.0)
    for number in range(100):
        limiter.acquire(f"flood {number}", 100.0)
    assert len(limiter._used_up_to) <= 10


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 4)), max_size=60))
def test_no_more_is_allowed_than_the_burst_and_the_rate(calls: list[tuple[float, int]]) -> None:
    limiter, now, allowed = RateLimiter(burst=10, per_second=3), 0.0, 0
    for pause, amount in calls:
        now += pause
        if limiter.acquire("a", now, amount).allowed:
            allowed += amount
        assert allowed <= 10 + 3 * now + 1e-6


# ---- the heartbeat interval ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_calm_queue_keeps_the_usual_interval(fraction: float) -> None:
    assert (
        backpressure.interval_s(60, 600, 0.0, fraction)
        == backpressure.interval_s(60, 600, backpressure.CALM, fraction)
        == 60
    )


def test_a_filling_queue_slows_the_fleet_down_and_spreads_it() -> None:
    half = [backpressure.interval_s(60, 600, 0.5, n / 10) for n in range(11)]
    full = [backpressure.interval_s(60, 600, 1.0, n / 10) for n in range(11)]
    assert 60 < sum(half) / 11 < sum(full) / 11
    assert len(set(half)) > 5
    assert len(set(full)) > 5
    assert max(full) == 240


@given(st.integers(1, 900), st.integers(1, 3600), st.floats(0, 2), st.floats(0, 1))
def test_the_interval_never_exceeds_half_the_offline_threshold(
    usual_s: int, offline_s: int, fill_ratio: float, fraction: float
) -> None:
    interval_s = backpressure.interval_s(usual_s, offline_s, fill_ratio, fraction)
    assert usual_s <= interval_s <= max(usual_s, offline_s // 2)


# ---- the rate of refusals -----------------------------------------------------------------------------------------


def test_a_few_refusals_are_sent_at_once_and_the_others_one_after_another() -> None:
    pacer = backpressure.RefusalPacer(per_s=10, at_once=3, within_s=5)
    assert [pacer.wait_s(100.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    # Time that has passed since the last refusal shortens the wait. After a while without refusals, the next refusals
    # are sent at once again.
    assert pacer.wait_s(100.2) == pytest.approx(0.1)
    assert pacer.wait_s(200.0) == 0.0


def test_no_client_waits_longer_for_a_refusal_than_the_limit() -> None:
    pacer = backpressure.RefusalPacer(per_s=10, at_once=3, within_s=5)
    waits = [pacer.wait_s(100.0) for _ in range(1000)]
    assert max(waits) == pytest.approx(5)
    # Clients that come a second later do not wait longer than the limit either.
    assert pacer.wait_s(101.0) == pytest.approx(4.1)


@given(st.lists(st.floats(0, 2), max_size=80))
def test_no_second_has_more_refusals_than_the_rate_and_the_burst(pauses: list[float]) -> None:
    pacer, now, at = backpressure.RefusalPacer(per_s=10, at_once=3, within_s=1e9), 0.0, []
    for pause in pauses:
        now += pause
        at.append(now + pacer.wait_s(now))
    for first in range(len(at)):
        within = [each for each in at[first:] if each <= at[first] + 1]
        assert len(within) <= 10 + 3 + 1
