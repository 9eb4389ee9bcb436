"""Silence without the time in which nexhb could not have heard a device."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.presence import AGENT_WAIT, GAP, Presence, Silent, Span, Taking, presence, renewed

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
WAIT = AGENT_WAIT + MINUTE


def at(seconds: float) -> datetime:
    """A moment after noon."""
    return NOON + timedelta(seconds=seconds)


def seconds(span: timedelta) -> float:
    """As a number."""
    return span.total_seconds()


blackout_lists = st.lists(st.integers(0, 4_000), min_size=0, max_size=8, unique=True).map(
    lambda cuts: [Span(at(start), at(end)) for start, end in zip(*[iter(sorted(cuts))] * 2, strict=False)][::-1]
)


def deaf_seconds(heard: int, now: int, blackouts: list[Span], wait: int) -> int:
    """Second by second: how much of the time since `heard` lies in a blackout that ended later, or in its wait."""
    own = [(seconds(b.start - NOON), seconds(b.end - NOON)) for b in blackouts if b.end > at(heard)]
    return sum(any(start <= second < end + wait for start, end in own) for second in range(heard, now))


@settings(max_examples=300, deadline=None)
@given(blackout_lists, st.integers(0, 4_500), st.integers(0, 4_500), st.integers(0, 400), st.integers(1, 1_500))
def test_silence_is_the_time_in_which_a_device_could_have_been_heard(
    blackouts: list[Span], heard: int, now: int, wait: int, longer_than: int
) -> None:
    past = [Span(one.start, min(one.end, at(now))) for one in blackouts if one.start < at(now)]
    known = Presence(at(now), None, past, timedelta(seconds=wait))
    silent = max(now - heard, 0) - (deaf_seconds(heard, now, past, wait) if heard < now else 0)
    assert seconds(known.silence(at(heard))) == silent
    found = known.silent(timedelta(seconds=longer_than))
    offline = at(heard) < found.before and not any(one.start <= at(heard) < one.end for one in found.but_not)
    assert offline == (silent > longer_than)
    assert all(one.end < found.before for one in found.but_not)


def test_a_fleet_is_not_offline_because_nexhb_was_away() -> None:
    """A minute's threshold and 79 s without a daemon: every device was offline, and doctor was content."""
    known = presence(at(80), Taking(at(79), at(79)), [Span(at(0), at(79))], MINUTE)
    assert known.taking_since == at(79)
    assert seconds(known.silence(at(-10))) == 10
    assert known.silent(MINUTE).before <= at(-10)
    late = presence(at(79 + 435 + 51), Taking(at(79), at(79 + 435 + 50)), [Span(at(0), at(79))], MINUTE)
    assert seconds(late.silence(at(-10))) == 61  # and did not come back when every agent would have


def test_a_device_that_was_offline_before_a_blackout_stays_so() -> None:
    known = presence(at(80), Taking(at(79), at(79)), [Span(at(0), at(79))], MINUTE)
    assert seconds(known.silence(at(-61))) == 61
    assert at(-61) < known.silent(MINUTE).before


def test_who_was_heard_after_a_blackout_is_given_no_more_time() -> None:
    known = presence(at(200), Taking(at(79), at(199)), [Span(at(0), at(79))], MINUTE)
    assert seconds(known.silence(at(100))) == 100
    found = known.silent(MINUTE)
    assert found.before == at(140)
    assert [(one.start, one.end) for one in found.but_not] == [(at(-60), at(79))]
    assert found.multirange == "{[2026-11-24T11:59:00+00:00,2026-11-24T12:01:19+00:00)}"


def test_while_nobody_takes_heartbeats_no_silence_grows() -> None:
    for now in (60, 600, 6_000):
        known = presence(at(now), Taking(at(-900), at(0)), [], MINUTE)
        assert known.taking_since is None
        assert seconds(known.silence(at(-20))) == 20


def test_without_a_daemon_ever_silence_is_the_time_that_passed() -> None:
    known = presence(NOON, None, [], MINUTE)
    assert (known.taking_since, known.silence(at(-90)), known.silent(MINUTE).but_not) == (None, 1.5 * MINUTE, ())


def test_a_renewal_in_time_is_none_of_a_gap() -> None:
    assert renewed(None, NOON) == (Taking(NOON, NOON), None)
    known = Taking(at(-100), at(0))
    assert renewed(known, NOON + GAP) == (Taking(at(-100), NOON + GAP), None)
    later = NOON + GAP + timedelta(microseconds=1)
    assert renewed(known, later) == (Taking(later, later), Span(NOON, later))


def test_another_daemon_that_was_there_a_moment_before_is_not_turned_back() -> None:
    assert renewed(Taking(at(-100), at(0.5)), NOON) == (Taking(at(-100), at(0.5)), None)


def test_a_renewal_that_lies_ahead_was_made_by_a_wrong_clock_and_counts_for_nothing() -> None:
    for ahead in (86_400, 61):
        assert renewed(Taking(NOON, at(ahead)), NOON) == (Taking(NOON, NOON), None)


def test_a_blackout_that_ends_ahead_was_written_by_a_wrong_clock_and_is_none() -> None:
    """The database's clock was 90 hours ahead for a moment: for as long, no device went offline any more."""
    spans = [Span(at(150), at(200)), Span(at(50), at(90 * 3600)), Span(at(0), at(10))]
    known = presence(at(100), Taking(at(90), at(99)), spans, MINUTE)
    assert known.blackouts == (Span(at(0), at(10)),)
    assert seconds(known.silence(at(20))) == 80


def test_a_blackout_that_another_daemon_ended_a_moment_before_ends_now() -> None:
    assert presence(at(100), None, [Span(at(50), at(120))], MINUTE).blackouts == (Span(at(50), at(100)),)


def test_blackouts_of_long_ago_cost_a_question_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that counts is walked through once more for the next."""
    walks: list[int] = []
    plain = Presence._cutoff

    def counted(self: Presence, blackouts: int, longer_than: timedelta) -> datetime:
        walks.append(blackouts)
        return plain(self, blackouts, longer_than)

    monkeypatch.setattr(Presence, "_cutoff", counted)
    old = [Span(at(-10_000 * day), at(-10_000 * day + 60)) for day in range(1, 200)]
    assert presence(NOON, Taking(at(-9_000), at(-1)), old, MINUTE).silent(10 * MINUTE) == Silent(at(-600))
    assert walks == [0]
