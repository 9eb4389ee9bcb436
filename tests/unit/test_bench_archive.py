"""The pure parts of the archive scenarios: a lived day, what a log says of a night, latencies of a stretch."""

from __future__ import annotations

import math
from array import array
from datetime import UTC, date, datetime
from typing import Any

import pytest

from bench import history
from bench.cost import Sample
from bench.fleet import BUCKET_US, MICROS, schedule
from bench.night import Night, Window, at_s
from bench.report import latencies_due
from bench.runs.archive import RETENTION_DAYS, level_of, old_days_of
from bench.runs.reader import says_why
from bench.stack import StackError
from nexhb.jobs import plan

DAY = "device_heartbeats_20261110"
START_US = round(datetime(2026, 11, 10, tzinfo=UTC).timestamp()) * MICROS


def test_a_lived_day_has_every_device_once_a_minute_as_it_arrives() -> None:
    minutes = list(history.lived(50, 1440, 60, START_US, seed=1))
    assert len(minutes) == 1440
    assert all(sorted(beat.device for beat in minute) == list(range(50)) for minute in minutes)
    arrived = [[beat.at_us + beat.way_us for beat in minute] for minute in minutes]
    assert all(times == sorted(times) for times in arrived)
    # not by device: a scan in the order of the key finds the rows all over the table
    assert any([beat.device for beat in minute] != list(range(50)) for minute in minutes)


def test_a_lived_day_stays_within_its_day_and_has_one_row_a_bucket() -> None:
    for beats in (24, 1440, 2880):
        day = [beat for batch in history.lived(20, beats, 86_400 // beats, START_US, seed=2) for beat in batch]
        assert all(START_US <= beat.at_us < START_US + 86_400 * MICROS for beat in day)
        assert len({(beat.device, beat.at_us // BUCKET_US) for beat in day}) == 20 * beats


def test_a_schedule_that_was_cut_counts_what_was_sent() -> None:
    whole = schedule(100, 60, 15, 60, seed=1)
    head = whole.head(10, 5.0)
    assert (len(head), head.duration_s, head.distinct_buckets()) == (10, 5.0, 10)
    assert head.offset_us == whole.offset_us[:10]


def test_latencies_of_a_stretch_are_those_that_were_due_in_it_and_acknowledged() -> None:
    offsets = array("q", [0, 1_000_000, 2_000_000, 3_000_000])
    assert latencies_due(offsets, [0.1, math.nan, 0.3, 0.4], 0.5, 3.0) == [0.3]
    # a load that was cut has fewer latencies than its schedule has sends
    assert latencies_due(offsets, [0.1, 0.2], 0.0, 9.0) == [0.1, 0.2]


def event(second: float, name: str, **fields: Any) -> dict[str, Any]:
    """A line of the daemon's log."""
    at = datetime.fromtimestamp(1_795_000_000 + second, UTC)
    return {"event": name, "ts": at.isoformat().replace("+00:00", "Z"), **fields}


NIGHT = Night(
    200,
    {"status": "completed"},
    Window(1_795_000_000, 1_795_000_030),
    [
        event(0.5, "archive.start", partition=DAY),
        event(0.75, "partition.detach", partition=DAY),
        event(12, "archive.end", partition=DAY),
        event(12.5, "partition.drop", partition=DAY),
        event(25, "http.bad_request_line"),
    ],
)


def test_an_archive_lasts_from_its_first_step_to_its_verification() -> None:
    archive = NIGHT.archive(DAY)
    assert archive.seconds == pytest.approx(11.5)
    assert archive.start_s == at_s(NIGHT.events[0])
    assert NIGHT.timeline() == "begun 0.5 s, detached 0.8 s, verified 12.0 s, dropped 12.5 s, answered 30.0 s"


def test_a_day_that_was_not_archived_is_an_error_with_the_nights_answer() -> None:
    with pytest.raises(StackError, match="completed"):
        NIGHT.archive("device_heartbeats_20261111")


def test_a_night_says_why_it_failed_by_the_day_and_who_was_in_the_way() -> None:
    reason = f"archive {DAY}: {DAY} cannot be detached: pid 7 (report) is idle in transaction since 9 s."

    def night(status: int, reason: str) -> Night:
        return Night(status, {"status": "failed", "reason": reason}, NIGHT.asked, ())

    assert says_why(night(500, reason), DAY)
    assert not says_why(night(200, reason), DAY)
    assert not says_why(night(500, "archive: lock timeout"), DAY)
    assert not says_why(NIGHT, DAY)


def test_the_old_days_are_old_and_leave_no_gap() -> None:
    today = date(2026, 11, 24)
    first, second = old_days_of(today)
    rules = plan.Rules(RETENTION_DAYS, 14, RETENTION_DAYS * (datetime(2026, 1, 2) - datetime(2026, 1, 1)))  # noqa: DTZ001
    days = [_day(first), _day(second)]
    steps = plan.nightly(days, datetime(2026, 11, 24, 12, tzinfo=UTC), rules)
    assert {s.target for s in steps if s.kind is plan.Kind.ARCHIVE} == {day.name for day in days}
    made = [s.make for s in steps if s.kind is plan.Kind.CREATE and s.make]
    assert min(made) == date(2026, 11, 17)


def _day(day: date) -> plan.Day:
    start = datetime.combine(day, datetime.min.time(), UTC)
    end = datetime.combine(date.fromordinal(day.toordinal() + 1), datetime.min.time(), UTC)
    return plan.Day(f"device_heartbeats_{day:%Y%m%d}", start, end, "active", attached=True, present=True)


def test_the_level_before_is_that_of_the_last_two_seconds() -> None:
    rising = [Sample(0.05 * n, 50.0 + (n >= 100)) for n in range(140)]
    assert level_of(rising) == 51.0
