"""Test the checks: which responses a token may receive, and which heartbeats an older copy of the database may lack."""

from __future__ import annotations

import math

import pytest

from tests.faults.check import _is_loss_allowed
from tests.faults.device_client import RequestOutcome
from tests.faults.journal import Event
from tests.faults.managed_devices import State, TokenState, why_wrong

ACKNOWLEDGED, REJECTED, REFUSED = Event.ACKNOWLEDGED, Event.REJECTED, Event.REFUSED
COMMITTED_S, SOON_S, LATE_S = 100.0, 101.0, 107.0  # LATE_S: after the limit, and a margin for a busy machine


@pytest.mark.parametrize(
    ("state", "sent_s", "connected_since_s", "outcome"),
    [
        (State.GOOD, SOON_S, 0.0, RequestOutcome(REJECTED, "401 …")),
        (State.REVOKED, SOON_S, 0.0, RequestOutcome(REJECTED, "401 …")),
        (State.FORGOTTEN, SOON_S, 0.0, RequestOutcome(REJECTED, "401 …")),
        (State.GOOD, LATE_S, 0.0, RequestOutcome(REJECTED, "410 …")),
        (State.REVOKED, LATE_S, 0.0, RequestOutcome(ACKNOWLEDGED, "200")),
        (State.UNKNOWN, LATE_S, 0.0, RequestOutcome(ACKNOWLEDGED, "200")),
    ],
)
def test_a_response_that_the_state_of_the_token_forbids_is_wrong(
    state: State, sent_s: float, connected_since_s: float, outcome: RequestOutcome
) -> None:
    assert why_wrong(TokenState(state, COMMITTED_S), sent_s, connected_since_s, outcome)


@pytest.mark.parametrize(
    ("state", "sent_s", "connected_since_s", "outcome"),
    [
        (State.GOOD, LATE_S, 0.0, RequestOutcome(ACKNOWLEDGED, "200")),
        (State.GOOD, SOON_S, 0.0, RequestOutcome(REJECTED, "410 …")),  # readmitted a moment ago
        (State.REVOKED, SOON_S, 0.0, RequestOutcome(ACKNOWLEDGED, "200")),
        (
            State.REVOKED,
            LATE_S,
            LATE_S - 1,
            RequestOutcome(ACKNOWLEDGED, "200"),
        ),  # daemon and database reconnected just before
        (State.REVOKED, LATE_S, math.inf, RequestOutcome(ACKNOWLEDGED, "200")),  # daemon and database are disconnected
        (State.UNKNOWN, LATE_S, 0.0, RequestOutcome(REJECTED, "401 …")),
        (State.FORGOTTEN, LATE_S, 0.0, RequestOutcome(REFUSED, "503")),
        (State.CHANGING, LATE_S, 0.0, RequestOutcome(ACKNOWLEDGED, "200")),
    ],
)
def test_a_response_that_the_state_of_the_token_allows_is_not_wrong(
    state: State, sent_s: float, connected_since_s: float, outcome: RequestOutcome
) -> None:
    assert not why_wrong(TokenState(state, COMMITTED_S), sent_s, connected_since_s, outcome)


def test_an_older_copy_may_lose_only_what_was_acknowledged_between_copy_and_replacement() -> None:
    copied_and_replaced = [(10.0, 20.0)]
    assert _is_loss_allowed([(12.0, 13.0)], copied_and_replaced)
    assert not _is_loss_allowed([(8.0, 9.0)], copied_and_replaced)
    assert not _is_loss_allowed([(21.0, 22.0)], copied_and_replaced)
    assert not _is_loss_allowed([(12.0, 13.0), (21.0, 22.0)], copied_and_replaced)  # also acknowledged later
    assert not _is_loss_allowed([(12.0, 13.0)], [])
