"""The rollout selects the same keys each time, more with each step, and about the given percentage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nexhb.reading import rollout

PERCENT = st.integers(0, 100)


@given(st.text(), PERCENT, PERCENT)
def test_a_selected_key_stays_selected_at_a_higher_percentage(key: str, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert rollout.is_included(key, many) or not rollout.is_included(key, few)


@given(st.text())
def test_no_key_is_selected_at_0_percent_and_every_key_at_100(key: str) -> None:
    assert not rollout.is_included(key, 0)
    assert rollout.is_included(key, 100)


def test_the_position_of_a_key_never_changes() -> None:
    """The position is the same in every daemon, after restarts and with every version of Python."""
    assert [rollout.place(f"kiosk-{n}") for n in range(5)] == [30, 78, 79, 46, 42]


def test_about_the_given_percentage_is_selected() -> None:
    keys = [f"kiosk-{n}" for n in range(10_000)]
    for percent in (1, 10, 50, 90):
        share = sum(rollout.is_included(key, percent) for key in keys) / len(keys)
        assert abs(share - percent / 100) < 0.02
