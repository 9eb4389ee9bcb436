"""The parts of a device's day: each rule separately, and all of them against an oracle that looks at each moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nexhb.watching.uptime import UNIT_S, Circumstances, DayParts, Range, day_parts, share
from tests.support.uptime_truth import DAY, HOUR, START, Sent, existed_from, history, known, true_parts

ALWAYS = [Range(START - DAY, START + 2 * DAY)]
UP = 900_000  # an uptime at the start of the day


def day(**changes: object) -> Circumstances:
    """Return a past day of a shop that is always open."""
    return replace(Circumstances(START, START + 2 * DAY, 600.0, ALWAYS, ()), **changes)  # type: ignore[arg-type]


def regular(
    start: float, end: float, *, boot: float = -UP, received: float | None = None, **more: object
) -> list[Sent]:
    """Return heartbeats every 60 s, from `start` to `end` (seconds of the day)."""
    times = [START + start + n * 60 for n in range(int((end - start) // 60))]
    return [
        Sent(at, at if received is None else START + received, int(at - START - boot), **more)  # type: ignore[arg-type]
        for at in times
    ]


def parts(sent: Sequence[Sent], circumstances: Circumstances | None = None, interval_s: float = 60) -> DayParts:
    circumstances = circumstances or day()
    result = day_parts(known(sorted(sent), circumstances, interval_s), circumstances)
    assert result is not None
    return result


def minutes(result: DayParts) -> dict[str, float]:
    """Return the parts that are not 0, in minutes."""
    return {name: getattr(result, name) / 10 for name in DayParts._fields[:6] if getattr(result, name)}


WHOLE = regular(-HOUR, DAY + HOUR)


def test_a_device_that_is_heard_every_minute_was_up_all_day() -> None:
    result = parts(WHOLE)
    assert minutes(result) == {"heard": 1440}
    assert (result.unity, result.flaps, result.reboots, result.is_open) == (14_400, 0, 0, False)


def test_time_between_neighbours_at_most_one_and_a_half_intervals_apart_is_heard() -> None:
    near = [one for one in WHOLE if one.at != START + HOUR + 60]
    assert minutes(parts(near, interval_s=80)) == {"heard": 1440}
    assert minutes(parts(near, interval_s=79)) == {"heard": 1438, "replayed": 2}


def test_heartbeats_that_arrive_when_the_line_is_back_were_replayed_from_the_first_to_that_moment() -> None:
    down = regular(10 * HOUR, 12 * HOUR, received=12 * HOUR)
    result = parts([*regular(-HOUR, 10 * HOUR), *down, *regular(12 * HOUR, DAY + HOUR)])
    assert minutes(result) == {"heard": 1319, "replayed": 121}  # from 09:59, the last live one, to 12:00
    assert result.flaps == 1


def test_a_replay_that_is_overtaken_by_live_heartbeats_ends_when_the_line_was_back() -> None:
    down = regular(10 * HOUR, 12 * HOUR, received=13 * HOUR)  # the queue was sent an hour later
    result = parts([*regular(-HOUR, 10 * HOUR), *down, *regular(12 * HOUR, DAY + HOUR)])
    assert minutes(result) == {"heard": 1319, "replayed": 121}


def test_heartbeats_that_arrive_within_the_offline_threshold_were_heard() -> None:
    down = regular(10 * HOUR, 10 * HOUR + 540, received=10 * HOUR + 550)
    result = parts([*regular(-HOUR, 10 * HOUR), *down, *regular(10 * HOUR + 540, DAY + HOUR)])
    assert (minutes(result), result.flaps) == ({"heard": 1440}, 0)


def test_a_gap_through_which_the_uptime_ran_on_counts_as_replayed() -> None:
    result = parts([*regular(-HOUR, 10 * HOUR), *regular(12 * HOUR, DAY + HOUR)])
    assert minutes(result) == {"heard": 1319, "replayed": 121}
    assert (result.flaps, result.reboots, result.unity) == (1, 0, 13_190)


def test_a_device_that_comes_back_with_a_fresh_uptime_was_off_until_it_booted() -> None:
    boot = 12 * HOUR - 30
    result = parts([*regular(-HOUR, 10 * HOUR), *regular(12 * HOUR, DAY + HOUR, boot=boot)])
    assert minutes(result) == {"heard": 1319.5, "off": 120.5}
    assert (result.flaps, result.reboots) == (1, 1)


def test_a_device_that_ran_for_an_hour_before_it_was_heard_had_no_line_in_that_hour() -> None:
    result = parts([*regular(-HOUR, 10 * HOUR), *regular(12 * HOUR, DAY + HOUR, boot=11 * HOUR)])
    assert minutes(result) == {"heard": 1319, "off": 61, "replayed": 60}


def test_a_gap_without_an_uptime_is_unknown() -> None:
    later = [one._replace(uptime_s=None) for one in regular(12 * HOUR, DAY + HOUR)]
    assert minutes(parts([*regular(-HOUR, 10 * HOUR), *later])) == {"heard": 1319, "unknown": 121}


@pytest.mark.parametrize(
    ("next_sent", "expected"),
    [
        ([], {"heard": 599, "unknown": 841}),
        (regular(DAY + HOUR, DAY + 2 * HOUR), {"heard": 599, "replayed": 841}),
        (regular(DAY + HOUR, DAY + 2 * HOUR, boot=DAY + HOUR - 60), {"heard": 599, "off": 841}),
        (regular(DAY + HOUR, DAY + 2 * HOUR, boot=20 * HOUR), {"heard": 599, "off": 601, "replayed": 240}),
    ],
    ids=["not heard since", "ran on", "booted later", "booted in the day"],
)
def test_the_first_heartbeat_after_the_day_explains_its_last_silence(
    next_sent: list[Sent], expected: dict[str, float]
) -> None:
    result = parts([*regular(-HOUR, 10 * HOUR), *next_sent])
    assert minutes(result) == expected
    assert result.is_open == (not next_sent)
    assert result.flaps == 1
    assert result.reboots == ("off" in expected and "replayed" in expected)  # counted on the day of the boot


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (regular(10 * HOUR, DAY + HOUR), {"unknown": 600, "heard": 840}),
        ([*regular(-9 * HOUR, -8 * HOUR), *regular(10 * HOUR, DAY + HOUR)], {"replayed": 600, "heard": 840}),
        ([*regular(-9 * HOUR, -8 * HOUR), *regular(10 * HOUR, DAY + HOUR, boot=6 * HOUR)],
         {"off": 360, "replayed": 240, "heard": 840}),
        ([*regular(-9 * HOUR, -8 * HOUR), *regular(DAY + HOUR, DAY + 2 * HOUR)], {"replayed": 1440}),
        ([*regular(-9 * HOUR, -8 * HOUR)], {"unknown": 1440}),
        (regular(DAY + HOUR, DAY + 2 * HOUR), {"unknown": 1440}),
        ([], {"unknown": 1440}),
    ],
    ids=["never before", "ran on", "booted", "a silent day", "silent since", "the day before the first", "never"],
)  # fmt: skip
def test_a_day_that_begins_in_a_silence(sent: list[Sent], expected: dict[str, float]) -> None:
    result = parts(sent)
    assert minutes(result) == expected
    assert result.flaps == 0  # the silence began earlier


def test_a_blackout_is_ours_and_does_not_make_a_silence_longer() -> None:
    """A kiosk that lost its queue: 16 minutes between two heartbeats, 15 of them in the blackout."""
    blackout = [Range(START + 10 * HOUR - 30, START + 10 * HOUR + 870)]
    sent = [*regular(-HOUR, 10 * HOUR), *regular(10 * HOUR + 900, DAY + HOUR, boot=10 * HOUR + 890)]
    result = parts(sent, day(blackouts=blackout))
    assert minutes(result) == {"ours": 15, "heard": 1425}
    assert result.flaps == 0


def test_closed_comes_before_ours_and_ours_before_the_rest() -> None:
    opened = [Range(START + 8 * HOUR, START + 20 * HOUR)]
    blackouts = [Range(START + 7 * HOUR, START + 9 * HOUR)]
    assert minutes(parts(WHOLE, day(open=opened, blackouts=blackouts))) == {"closed": 720, "ours": 60, "heard": 660}


def test_a_shop_that_switches_its_kiosks_off_overnight_does_not_flap() -> None:
    opened = [Range(START + 8 * HOUR, START + 20 * HOUR), Range(START + DAY + 8 * HOUR, START + DAY + 20 * HOUR)]
    sent = [
        *regular(8 * HOUR, 20 * HOUR, boot=8 * HOUR - 30),
        *regular(DAY + 8 * HOUR, DAY + 9 * HOUR, boot=DAY + 8 * HOUR - 30),
    ]
    result = parts([*regular(-5 * HOUR, -4 * HOUR), *sent], day(open=opened))
    assert (minutes(result), result.flaps, result.reboots) == ({"closed": 720, "heard": 719, "off": 1}, 0, 1)
    late = [one for one in sent if one.at < START + DAY]
    assert parts([*late, *regular(DAY + 8 * HOUR + 700, DAY + 9 * HOUR)], day(open=opened)).flaps == 1


def test_only_the_time_between_creation_and_revocation_counts() -> None:
    result = parts(regular(HOUR, DAY), day(created=START + HOUR, revoked=START + 5 * HOUR))
    assert minutes(result) == {"heard": 240}
    circumstances = day(created=START + DAY)
    assert day_parts(known([], circumstances, 60), circumstances) is None
    circumstances = day(revoked=START)
    assert day_parts(known(WHOLE, circumstances, 60), circumstances) is None


def test_an_imported_device_existed_before_its_creation_from_its_first_heartbeat_on() -> None:
    assert minutes(parts(regular(HOUR, DAY + HOUR), day(created=START + 30 * DAY))) == {"heard": 1380}


def test_the_present_day_ends_now() -> None:
    sent = regular(-HOUR, 10 * HOUR)
    assert minutes(parts(sent, day(now=START + 10 * HOUR + 20))) == {"heard": 600.3}
    assert minutes(parts(sent, day(now=START + 11 * HOUR))) == {"heard": 599, "unknown": 61}


def test_a_slow_clock_shifts_the_opening_hours_and_is_not_a_replay() -> None:
    sent = [one._replace(received=one.at + 2400) for one in WHOLE]
    circumstances = day(open=[Range(START + 8 * HOUR, START + 20 * HOUR)])
    result = day_parts(known(sent, circumstances, 60, 2400), circumstances)
    assert result is not None
    assert minutes(result) == {"closed": 720, "heard": 720}


def test_unity_runs_from_the_heartbeat_that_says_so_to_the_one_that_denies_it() -> None:
    crashed = [one._replace(unity=not 10 * HOUR <= one.at - START < 12 * HOUR) for one in WHOLE]
    result = parts(crashed)
    assert (minutes(result), result.unity) == ({"heard": 1440}, 13_200)


def test_the_battery_s_least_is_of_the_day() -> None:
    sent = [one._replace(battery=50) for one in WHOLE]
    sent[0], sent[300] = sent[0]._replace(battery=3), sent[300]._replace(battery=41)
    assert parts(sent).battery_least == 41
    assert parts(WHOLE).battery_least is None


def test_six_short_reboots_are_counted_and_are_heard() -> None:
    boots = [(n * HOUR - 20, n * HOUR, (n + 1) * HOUR) for n in range(1, 7)]
    sent = [*regular(-HOUR, HOUR), *(one for boot, start, end in boots for one in regular(start, end, boot=boot))]
    result = parts([*sent, *regular(7 * HOUR, DAY + HOUR, boot=6 * HOUR - 20)])
    assert (minutes(result), result.reboots, result.flaps) == ({"heard": 1440}, 6, 0)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [((1400, 40, 1440, 0, 0), 1.0), ((600, 0, 1440, 240, 0), 0.5), ((0, 0, 1440, 1000, 440), None)],
)
def test_the_share_leaves_out_closed_and_ours(parts: tuple[int, int, int, int, int], expected: float | None) -> None:
    assert share(*parts) == expected


# ---- against the oracle ---------------------------------------------------------------------------------------------


def ranges(random: Random) -> list[Range]:
    ends = sorted(START + random.randrange(14_400) * UNIT_S for _ in range(2 * random.randrange(4)))
    return [Range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])  # another seed is not simpler
def test_the_parts_are_those_of_the_rules_applied_to_each_moment(seed: int) -> None:
    random = Random(seed)  # noqa: S311 - no secret
    sent = history(random)
    created, revoked = (START + random.randrange(-14_400, 14_400) * UNIT_S for _ in range(2))
    circumstances = day(
        open=ranges(random) or ALWAYS,
        blackouts=ranges(random),
        created=created,
        revoked=revoked if revoked > created else inf,
    )
    interval_s = random.choice([60, 600])
    result = day_parts(known(sent, circumstances, interval_s), circumstances)
    truth = true_parts(sent, circumstances, interval_s)
    assert (result is None) == (truth is None)
    if result is not None and truth is not None:
        assert result._replace(flaps=-1, reboots=-1, is_open=False) == truth
        lived = min(circumstances.revoked, START + DAY) - max(existed_from(sent, circumstances), START)
        assert sum(result[:6]) == round(lived / UNIT_S)
