"""Which differences between the last status and the history count as mismatches, and which are excused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from nexhb import partitions
from nexhb.heartbeat import bucket_of
from nexhb.partitions import Partition
from nexhb.reading import comparison
from nexhb.reading.queries import ReadResult

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
RETENTION = 7 * DAY
SINCE = NOW - RETENTION


class Row(msgspec.Struct):
    """A device in a list."""

    device_id: str
    battery_pct: int
    heard_at: datetime = NOW


def result(*rows: tuple[str, int], count: int | None = None) -> ReadResult:
    """Return a result with rows of (device_id, battery_pct)."""
    return ReadResult(len(rows) if count is None else count, [Row(*row) for row in rows])


def test_missing_and_unequal_rows_differ() -> None:
    fast, history = result(("a", 1), ("b", 2), ("c", 3)), result(("b", 2), ("c", 4), ("d", 5))
    assert comparison.differing(fast, history) == ["a", "c", "d"]
    assert comparison.differing(fast, fast) == []
    assert comparison.differing(result(), result(("x", 1))) == ["x"]


def test_of_lists_cut_at_their_limit_only_the_rows_in_both_are_compared() -> None:
    fast, history = result(("a", 1), ("b", 2), count=3), result(("b", 3), ("c", 4), count=3)
    assert comparison.differing(fast, history) == ["b"]
    for cut, whole in ((3, None), (None, 3)):  # also if only one of the two lists was cut
        fast, history = result(("a", 1), ("b", 2), count=cut), result(("b", 3), ("c", 4), count=whole)
        assert comparison.differing(fast, history) == ["b"]


def test_a_difference_in_presence_is_distinguished_from_one_in_content() -> None:
    one, heard, other = Row("a", 1), Row("a", 1, NOW + SECOND), Row("a", 2)
    assert comparison.is_same_content("a", ReadResult(1, [one]), ReadResult(1, [heard]))
    assert not comparison.is_same_content("a", ReadResult(1, [one]), ReadResult(1, [other]))
    assert comparison.is_same_content(
        "a", ReadResult(1, [one]), ReadResult(0, [])
    )  # only one list has the device: a difference in presence


def attached(*days: int, **changes: Any) -> list[Partition]:
    """Return the partitions of the days that are `days` days ago."""
    start = partitions.midnight(NOW.date())
    return [Partition(f"p{n}", start - n * DAY, start - (n - 1) * DAY, **changes) for n in days]


@pytest.mark.parametrize(
    ("days", "since"),
    [
        (attached(*range(-2, 30)), NOW - RETENTION),
        (attached(0, 1, 2), datetime(2026, 6, 13, tzinfo=UTC)),
        (attached(0, 1, 3, 4, 5, 6, 7, 8), datetime(2026, 6, 14, tzinfo=UTC)),
        (attached(0) + attached(1, detach_pending=True), datetime(2026, 6, 15, tzinfo=UTC)),
        (attached(0) + attached(1, sealed=True), datetime(2026, 6, 15, tzinfo=UTC)),
        (attached(1, 2), datetime(2026, 6, 15, tzinfo=UTC)),
    ],
)
def test_the_history_is_complete_back_to_its_first_gap(days: list[Partition], since: datetime) -> None:
    assert comparison.complete_since(days, NOW, RETENTION) == since


def evidence(
    status: datetime | None,
    history: datetime | None,
    *,
    late: bool = False,
    clock_wrong: bool = False,
    partial: bool = False,
    received: timedelta = 0 * SECOND,
    heard: timedelta = 0 * SECOND,
) -> dict[str, Any]:
    """Return the evidence about a device with this last status and this newest row of the history. `received` and
    `heard`: by how much received_at and heard_at of the last status are later than those of the history."""
    return {
        "status_ts": status, "status_received_at": status and NOW + received,
        "history_ts": history, "history_received_at": history and NOW, "partial": partial,
        "status_heard_at": status and NOW + heard, "history_heard_at": history and NOW,
        "history_bucket": history and bucket_of(history, 10), "late": late,
        "clock_wrong": clock_wrong if status else None,
    }  # fmt: skip


MINUTE_AGO = NOW - 60 * SECOND


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        # the last status or the history is wrong
        (evidence(MINUTE_AGO, MINUTE_AGO), None),  # the same arrival, but different values
        (evidence(None, MINUTE_AGO), None),
        (evidence(MINUTE_AGO, None), None),
        (evidence(MINUTE_AGO, MINUTE_AGO - 10 * SECOND), None),
        (evidence(MINUTE_AGO - DAY, MINUTE_AGO), None),
        (evidence(SINCE - 30 * DAY, MINUTE_AGO), None),  # an old status, but a newer history
        (evidence(MINUTE_AGO, SINCE - 30 * DAY), None),
        (evidence(SINCE, None), None),
        (evidence(MINUTE_AGO, MINUTE_AGO - 60 * SECOND, clock_wrong=True), None),
        # neither the last status nor the history is wrong
        (evidence(MINUTE_AGO + 9 * SECOND, MINUTE_AGO), "same_bucket"),
        (evidence(MINUTE_AGO, MINUTE_AGO, received=SECOND), "same_bucket"),
        (evidence(MINUTE_AGO, MINUTE_AGO, clock_wrong=True), "same_bucket"),
        (evidence(SINCE - SECOND, None), "beyond_history"),
        (evidence(SINCE - SECOND, SINCE - DAY), "beyond_history"),
        (evidence(None, SINCE - DAY), "beyond_history"),
        (evidence(SINCE + SECOND, None, late=True), "late"),
        (evidence(MINUTE_AGO, MINUTE_AGO - 10 * SECOND, partial=True), "partial"),
    ],
)
def test_differences_are_excused_only_if_neither_result_is_wrong(row: dict[str, Any], reason: str | None) -> None:
    assert comparison.excuse(row, SINCE, 10, same_content=False) == reason


def test_a_later_heard_at_is_excused_as_a_duplicate_but_an_earlier_one_is_not() -> None:
    again, before = evidence(MINUTE_AGO, MINUTE_AGO, heard=SECOND), evidence(MINUTE_AGO, MINUTE_AGO, heard=-SECOND)
    assert comparison.excuse(again, SINCE, 10, same_content=True) == "heard_again"
    assert comparison.excuse(again, SINCE, 10, same_content=False) is None
    assert comparison.excuse(before, SINCE, 10, same_content=True) is None
