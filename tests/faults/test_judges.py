"""The judges, by themselves: which answers a token may hear, and which acknowledgements an older copy takes back."""

from __future__ import annotations

import math

import pytest

from tests.faults.asking import Heard
from tests.faults.check import _is_forgiven
from tests.faults.guests import Since, State, wrong
from tests.faults.record import What

ACKNOWLEDGED, TURNED_AWAY, REFUSED = What.ACKNOWLEDGED, What.TURNED_AWAY, What.REFUSED
COMMITTED_S, SOON_S, LATE_S = 100.0, 101.0, 107.0  # late: past the bound, and what a busy machine may take


@pytest.mark.parametrize(
    ("state", "asked_s", "together_s", "heard"),
    [
        (State.GOOD, SOON_S, 0.0, Heard(TURNED_AWAY, "401 …")),
        (State.REVOKED, SOON_S, 0.0, Heard(TURNED_AWAY, "401 …")),
        (State.FORGOTTEN, SOON_S, 0.0, Heard(TURNED_AWAY, "401 …")),
        (State.GOOD, LATE_S, 0.0, Heard(TURNED_AWAY, "410 …")),
        (State.REVOKED, LATE_S, 0.0, Heard(ACKNOWLEDGED, "200")),
        (State.UNKNOWN, LATE_S, 0.0, Heard(ACKNOWLEDGED, "200")),
    ],
)
def test_an_answer_that_may_not_come(state: State, asked_s: float, together_s: float, heard: Heard) -> None:
    assert wrong(Since(state, COMMITTED_S), asked_s, together_s, heard)


@pytest.mark.parametrize(
    ("state", "asked_s", "together_s", "heard"),
    [
        (State.GOOD, LATE_S, 0.0, Heard(ACKNOWLEDGED, "200")),
        (State.GOOD, SOON_S, 0.0, Heard(TURNED_AWAY, "410 …")),  # readmitted a moment ago
        (State.REVOKED, SOON_S, 0.0, Heard(ACKNOWLEDGED, "200")),
        (State.REVOKED, LATE_S, LATE_S - 1, Heard(ACKNOWLEDGED, "200")),  # daemon and database met a moment ago
        (State.REVOKED, LATE_S, math.inf, Heard(ACKNOWLEDGED, "200")),  # and here they do not
        (State.UNKNOWN, LATE_S, 0.0, Heard(TURNED_AWAY, "401 …")),
        (State.FORGOTTEN, LATE_S, 0.0, Heard(REFUSED, "503")),
        (State.CHANGING, LATE_S, 0.0, Heard(ACKNOWLEDGED, "200")),
    ],
)
def test_an_answer_that_may_come(state: State, asked_s: float, together_s: float, heard: Heard) -> None:
    assert not wrong(Since(state, COMMITTED_S), asked_s, together_s, heard)


def test_an_older_copy_takes_back_what_was_acknowledged_between_and_nothing_else() -> None:
    copied_and_swapped = [(10.0, 20.0)]
    assert _is_forgiven([(12.0, 13.0)], copied_and_swapped)
    assert not _is_forgiven([(8.0, 9.0)], copied_and_swapped)
    assert not _is_forgiven([(21.0, 22.0)], copied_and_swapped)
    assert not _is_forgiven([(12.0, 13.0), (21.0, 22.0)], copied_and_swapped)  # said again to the other database
    assert not _is_forgiven([(12.0, 13.0)], [])
