"""Who gets the fast path: always the same, more with each step, and about as many as were asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nexhb import rollout

PERCENT = st.integers(0, 100)


@given(st.text(), PERCENT, PERCENT)
def test_who_is_in_stays_in_when_more_come(key: str, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert rollout.is_in(key, many) or not rollout.is_in(key, few)


@given(st.text())
def test_nobody_is_in_at_0_and_everybody_at_100(key: str) -> None:
    assert not rollout.is_in(key, 0)
    assert rollout.is_in(key, 100)


def test_a_place_never_changes() -> None:
    """Across daemons, restarts and versions of Python."""
    assert [rollout.place(f"kiosk-{n}") for n in range(5)] == [30, 78, 79, 46, 42]


def test_about_as_many_are_in_as_were_asked_for() -> None:
    keys = [f"kiosk-{n}" for n in range(10_000)]
    for percent in (1, 10, 50, 90):
        share = sum(rollout.is_in(key, percent) for key in keys) / len(keys)
        assert abs(share - percent / 100) < 0.02
