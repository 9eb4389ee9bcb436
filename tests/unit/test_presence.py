"""Silence does not include the time in which nexhb could not receive heartbeats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.devices.presence import (
    AGENT_WAIT,
    MIN_BLACKOUT,
    Presence,
    ServicePeriod,
    SilenceFilter,
    Span,
    presence_at,
    renewed_period,
)

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
WAIT = AGENT_WAIT + MINUTE


def at(seconds: float) -> datetime:
    """Return a moment after noon."""
    return NOON + timedelta(seconds=seconds)


def seconds(span: timedelta) -> float:
    """Return a length of time in seconds."""
    return span.total_seconds()


blackout_lists = st.lists(st.integers(0, 4_000), min_size=0, max_size=8, unique=True).map(
    lambda cuts: [Span(at(start), at(end)) for start, end in zip(*[iter(sorted(cuts))] * 2, strict=False)][::-1]
)


def unavailable_seconds(heard: int, now: int, blackouts: list[Span], wait: int) -> int:
    """Count, second by second, the time since `heard` that falls within a blackout that ended after `heard`, or within
    the wait after such a blackout."""
    own = [(seconds(b.start - NOON), seconds(b.end - NOON)) for b in blackouts if b.end > at(heard)]
    return sum(any(start <= second < end + wait for start, end in own) for second in range(heard, now))


@settings(max_examples=300, deadline=None)
@given(blackout_lists, st.integers(0, 4_500), st.integers(0, 4_500), st.integers(0, 400), st.integers(1, 1_500))
def test_silence_is_the_time_in_which_a_heartbeat_could_have_been_received(
    blackouts: list[Span], heard: int, now: int, wait: int, longer_than: int
) -> None:
    past = [Span(span.start, min(span.end, at(now))) for span in blackouts if span.start < at(now)]
    presence = Presence(at(now), None, past, timedelta(seconds=wait))
    silent = max(now - heard, 0) - (unavailable_seconds(heard, now, past, wait) if heard < now else 0)
    assert seconds(presence.silence(at(heard))) == silent
    matching = presence.silent_for(timedelta(seconds=longer_than))
    offline = at(heard) < matching.before and not any(span.start <= at(heard) < span.end for span in matching.except_in)
    assert offline == (silent > longer_than)
    assert all(span.end < matching.before for span in matching.except_in)


def test_a_fleet_is_not_offline_because_nexhb_was_down() -> None:
    """Formerly, with a threshold of 60 s, every device was offline after 79 s without a daemon, and doctor reported no
    problem."""
    presence = presence_at(at(80), ServicePeriod(at(79), at(79)), [Span(at(0), at(79))], MINUTE)
    assert presence.in_service_since == at(79)
    assert seconds(presence.silence(at(-10))) == 10
    assert presence.silent_for(MINUTE).before <= at(-10)
    late = presence_at(at(79 + 435 + 51), ServicePeriod(at(79), at(79 + 435 + 50)), [Span(at(0), at(79))], MINUTE)
    assert seconds(late.silence(at(-10))) == 61  # the device has not sent although every agent would have by now


def test_a_device_that_was_offline_before_a_blackout_stays_offline() -> None:
    presence = presence_at(at(80), ServicePeriod(at(79), at(79)), [Span(at(0), at(79))], MINUTE)
    assert seconds(presence.silence(at(-61))) == 61
    assert at(-61) < presence.silent_for(MINUTE).before


def test_a_device_that_sent_a_heartbeat_after_a_blackout_gets_no_extra_time() -> None:
    presence = presence_at(at(200), ServicePeriod(at(79), at(199)), [Span(at(0), at(79))], MINUTE)
    assert seconds(presence.silence(at(100))) == 100
    matching = presence.silent_for(MINUTE)
    assert matching.before == at(140)
    assert [(span.start, span.end) for span in matching.except_in] == [(at(-60), at(79))]
    assert matching.multirange == "{[2026-11-24T11:59:00+00:00,2026-11-24T12:01:19+00:00)}"


def test_silence_does_not_grow_while_no_daemon_accepts_heartbeats() -> None:
    for now in (60, 600, 6_000):
        presence = presence_at(at(now), ServicePeriod(at(-900), at(0)), [], MINUTE)
        assert presence.in_service_since is None
        assert seconds(presence.silence(at(-20))) == 20


def test_if_no_daemon_ever_ran_silence_is_the_elapsed_time() -> None:
    presence = presence_at(NOON, None, [], MINUTE)
    assert (presence.in_service_since, presence.silence(at(-90)), presence.silent_for(MINUTE).except_in) == (
        None,
        1.5 * MINUTE,
        (),
    )


def test_a_timely_renewal_ends_no_blackout() -> None:
    assert renewed_period(None, NOON) == (ServicePeriod(NOON, NOON), None)
    period = ServicePeriod(at(-100), at(0))
    assert renewed_period(period, NOON + MIN_BLACKOUT) == (ServicePeriod(at(-100), NOON + MIN_BLACKOUT), None)
    later = NOON + MIN_BLACKOUT + timedelta(microseconds=1)
    assert renewed_period(period, later) == (ServicePeriod(later, later), Span(NOON, later))


def test_a_renewal_never_moves_the_time_of_another_daemons_renewal_back() -> None:
    assert renewed_period(ServicePeriod(at(-100), at(0.5)), NOON) == (ServicePeriod(at(-100), at(0.5)), None)


def test_a_renewal_in_the_future_was_made_by_a_wrong_clock_and_is_ignored() -> None:
    for ahead in (86_400, 61):
        assert renewed_period(ServicePeriod(NOON, at(ahead)), NOON) == (ServicePeriod(NOON, NOON), None)


def test_a_blackout_that_ends_in_the_future_was_written_by_a_wrong_clock_and_is_ignored() -> None:
    """Formerly, if the database's clock was 90 hours ahead for a moment, no device was shown as offline for the next 90
    hours."""
    spans = [Span(at(150), at(200)), Span(at(50), at(90 * 3600)), Span(at(0), at(10))]
    presence = presence_at(at(100), ServicePeriod(at(90), at(99)), spans, MINUTE)
    assert presence.blackouts == (Span(at(0), at(10)),)
    assert seconds(presence.silence(at(20))) == 80


def test_a_blackout_that_ends_a_few_seconds_in_the_future_ends_now() -> None:
    assert presence_at(at(100), None, [Span(at(50), at(120))], MINUTE).blackouts == (Span(at(50), at(100)),)


def test_old_blackouts_cost_a_query_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost grows with the square of the number of blackouts that count, so old blackouts must not count."""
    calls: list[int] = []
    original = Presence._cutoff

    def counted(self: Presence, blackouts: int, longer_than: timedelta) -> datetime:
        calls.append(blackouts)
        return original(self, blackouts, longer_than)

    monkeypatch.setattr(Presence, "_cutoff", counted)
    old = [Span(at(-10_000 * day), at(-10_000 * day + 60)) for day in range(1, 200)]
    assert presence_at(NOON, ServicePeriod(at(-9_000), at(-1)), old, MINUTE).silent_for(10 * MINUTE) == SilenceFilter(
        at(-600)
    )
    assert calls == [0]
