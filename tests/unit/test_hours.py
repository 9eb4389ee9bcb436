"""Opening hours in the zone of a site: when it is open, when that changes, and for how long, across changes of daylight
saving time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.devices.hours import MAX_RANGE, Hours
from nexhb.devices.presence import Span
from nexhb.errors import BadInput

BERLIN = "Europe/Berlin"
HOLIDAYS = "Mo-Sa 08:00-20:00; PH off"
MAYBE = "08:00-12:00 unknown, 12:00-13:00"
DAY = timedelta(days=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def spans(hours: str | None, start: str, end: str, zone: str = BERLIN) -> list[tuple[str, str]]:
    """Return the open spans as texts in UTC, such as 03-29T04:00."""
    found = Hours.parse(hours, zone).open_spans(utc(start), utc(end))
    return [(f"{span.start:%m-%dT%H:%M}", f"{span.end:%m-%dT%H:%M}") for span in found]


@pytest.mark.parametrize(
    ("hours", "start", "expected", "open_hours"),
    [
        # the night in which clocks are set forward has seven hours, the one in which they are set back has nine
        ("22:00-06:00", "2026-03-28T12:00", [("03-28T21:00", "03-29T04:00"), ("03-29T20:00", "03-30T04:00")], 15),
        ("22:00-06:00", "2026-10-24T12:00", [("10-24T20:00", "10-25T05:00"), ("10-25T21:00", "10-26T05:00")], 17),
        # a window of spans begins in the repeated hour
        ("22:00-06:00", "2020-10-24T12:00", [("10-24T20:00", "10-25T05:00"), ("10-25T21:00", "10-26T05:00")], 17),
        ("08:00-20:00", "2026-03-28T06:00", [("03-28T07:00", "03-28T19:00"), ("03-29T06:00", "03-29T18:00")], 24),
        ("08:00-20:00", "2026-10-24T05:00", [("10-24T06:00", "10-24T18:00"), ("10-25T07:00", "10-25T19:00")], 24),
        # boundaries within the hour that is skipped, and within the one that is repeated
        ("02:30-04:00", "2026-03-29T00:00", [("03-29T01:00", "03-29T02:00"), ("03-30T00:30", "03-30T02:00")], 2.5),
        ("01:00-02:30", "2026-10-24T12:00", [("10-24T23:00", "10-25T01:30"), ("10-26T00:00", "10-26T01:30")], 4),
        ("02:15-02:45", "2026-10-25T00:00", [("10-25T01:15", "10-25T01:45"), ("10-26T01:15", "10-26T01:45")], 1),
        ("24/7", "2026-10-24T12:00", [("10-24T12:00", "10-26T12:00")], 48),
        (None, "2026-10-24T12:00", [("10-24T12:00", "10-26T12:00")], 48),
        (HOLIDAYS, "2026-11-28T12:00", [("11-28T12:00", "11-28T19:00"), ("11-30T07:00", "11-30T12:00")], 12),
        # no site has a country, so that no day is a public holiday
        (HOLIDAYS, "2026-12-25T00:00", [("12-25T07:00", "12-25T19:00"), ("12-26T07:00", "12-26T19:00")], 24),
        (MAYBE, "2026-12-01T00:00", [("12-01T11:00", "12-01T12:00"), ("12-02T11:00", "12-02T12:00")], 2),
        ("24/7 off", "2026-12-01T00:00", [], 0),
    ],
)  # fmt: skip
def test_open_spans_and_open_time_follow_the_clock_of_the_site(
    hours: str | None, start: str, expected: list[tuple[str, str]], open_hours: float
) -> None:
    begin = utc(start)
    end = begin + 2 * DAY
    assert spans(hours, start, end.isoformat()[:16]) == expected
    parsed = Hours.parse(hours, BERLIN)
    assert parsed.open_time(begin, end) == timedelta(hours=open_hours)
    for moment in (begin + n * timedelta(minutes=15) for n in range(192)):
        assert parsed.is_open(moment) == any(s.start <= moment < s.end for s in parsed.open_spans(begin, end)), moment


def test_the_zone_decides_when_a_site_opens() -> None:
    assert spans("08:00-09:00", "2026-07-01T00:00", "2026-07-02T00:00", "UTC") == [("07-01T08:00", "07-01T09:00")]
    assert spans("08:00-09:00", "2026-07-01T00:00", "2026-07-02T00:00", "Asia/Tokyo") == [
        ("07-01T23:00", "07-02T00:00")
    ]
    assert spans("08:00-09:00", "2026-07-01T00:00", "2026-07-02T00:00", "Asia/Kathmandu") == [
        ("07-01T02:15", "07-01T03:15")
    ]


@pytest.mark.parametrize(
    ("hours", "at", "change"),
    [
        ("08:00-20:00", "2026-03-28T20:00", "2026-03-29T06:00"),
        ("08:00-20:00", "2026-03-29T06:00", "2026-03-29T18:00"),
        ("08:00-20:00", "2026-03-29T18:00", "2026-03-30T06:00"),
        ("2026 Dec 24-2027 Mar 5 00:00-24:00", "2026-12-25T00:00", "2027-03-05T23:00"),  # across several windows
        ("2027 Dec 1 08:00-10:00", "2026-12-01T00:00", "2027-12-01T07:00"),
        ("2029 Dec 1 08:00-10:00", "2026-12-01T00:00", None),
        ("2020 Mo 10:00-12:00", "2026-12-01T00:00", None),
        ("24/7", "2026-12-01T00:00", None),
        ("24/7 off", "2026-12-01T00:00", None),
        (None, "2026-12-01T00:00", None),
    ],
)
def test_the_next_change_is_found_within_400_days(hours: str | None, at: str, change: str | None) -> None:
    assert Hours.parse(hours, BERLIN).next_change(utc(at)) == (change and utc(change))


@pytest.mark.parametrize(
    ("hours", "zone", "names"),
    [
        ("Mo-Fr 8-20", BERLIN, "hours 'Mo-Fr 8-20' cannot be read at character 7."),
        ("25:00-26:00", BERLIN, "hours '25:00-26:00' cannot be read at character 1."),
        ("", BERLIN, "hours takes 1 to 500 printable characters."),
        (" ", BERLIN, "hours takes 1 to 500 printable characters."),
        ("Mo 08:00-10:00" + 500 * " ", BERLIN, "hours takes 1 to 500 printable characters."),
        ("Mo\n08:00-10:00", BERLIN, "hours takes 1 to 500 printable characters."),
        *(
            ("24/7", zone, "is not a time zone of the IANA database.")
            for zone in ("", "Berlin", "Europe", "/etc/passwd", "../UTC", "UTC ", "posix/Europe/Berlin", "Z" * 99)
        ),
        (None, "Mars/Olympus", "zone 'Mars/Olympus' is not a time zone of the IANA database."),
    ],
)  # fmt: skip
def test_hours_and_zones_that_cannot_be_read_are_refused_by_name(hours: str | None, zone: str, names: str) -> None:
    with pytest.raises(BadInput) as refused:
        Hours.parse(hours, zone)
    assert names in str(refused.value)


def test_a_range_of_ten_years_is_refused_or_cut() -> None:
    end = utc("2026-12-01T00:00")
    for text, share in ((None, 1), ("08:00-20:00", 0.5)):
        hours = Hours.parse(text, "UTC")
        with pytest.raises(BadInput, match="at most 400 days"):
            hours.open_spans(end - 3650 * DAY, end)
        assert hours.open_time(end - 3650 * DAY, end) == MAX_RANGE * share
        assert hours.open_time(end, end - DAY) == timedelta(0)
        assert hours.open_spans(end, end - DAY) == []


def test_the_most_spans_that_500_characters_can_state_are_counted() -> None:
    most = Hours.parse(
        ",".join(f"{n // 2:02}:{n % 2 * 30:02}-{n // 2:02}:{n % 2 * 30 + 1:02}" for n in range(41)), "UTC"
    )
    end = utc("2026-12-01T00:00")
    assert len(most.open_spans(end - 40 * DAY, end)) == 40 * 41
    assert most.open_time(end - 40 * DAY, end) == 40 * 41 * timedelta(minutes=1)


def merged(found: list[Span]) -> bool:
    return all(before.end < after.start for before, after in pairwise(found)) and all(s.start < s.end for s in found)


@settings(max_examples=60, deadline=None)
@given(
    hours=st.sampled_from(["22:00-06:00", "Mo-Fr 08:00-12:00,13:00-18:00", "Su 00:00-24:00", "Sa-Mo", "24/7", None]),
    zone=st.sampled_from([BERLIN, "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"]),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001 - its bounds are naive
    length=st.timedeltas(timedelta(0), timedelta(days=60)),
    share=st.floats(0, 1),
)
def test_spans_time_and_state_agree_with_each_other(
    hours: str | None, zone: str, start: datetime, length: timedelta, share: float
) -> None:
    parsed, end, between = Hours.parse(hours, zone), start + length, start + length * share
    found = parsed.open_spans(start, end)
    assert merged(found)
    assert sum((span.end - span.start for span in found), timedelta(0)) == parsed.open_time(start, end)
    assert parsed.open_time(start, between) + parsed.open_time(between, end) == parsed.open_time(start, end)
    assert parsed.is_open(between) == parsed.is_open(between.astimezone(ZoneInfo(zone)))
    change = parsed.next_change(between)
    if change is not None:
        assert change > between
        assert parsed.is_open(change) != parsed.is_open(between)
        state = (change - between) if parsed.is_open(between) else timedelta(0)
        assert parsed.open_time(between, change) == state
