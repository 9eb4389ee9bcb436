"""Which differences between the last status and the history count, and which make neither answer wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from nexhb import partitions, perfdiff, wire
from nexhb.partitions import Partition
from nexhb.reads import Found

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
RETENTION = 7 * DAY
SINCE = NOW - RETENTION


class Row(msgspec.Struct):
    """A device in a list."""

    device_id: str
    battery_pct: int
    heard_at: datetime = NOW


def found(*rows: tuple[str, int], count: int | None = None) -> Found:
    """Rows of devices with a battery."""
    return Found(len(rows) if count is None else count, [Row(*row) for row in rows])


def test_rows_that_are_missing_or_not_the_same_differ() -> None:
    fast, legacy = found(("a", 1), ("b", 2), ("c", 3)), found(("b", 2), ("c", 4), ("d", 5))
    assert perfdiff.differing(fast, legacy) == ["a", "c", "d"]
    assert perfdiff.differing(fast, fast) == []
    assert perfdiff.differing(found(), found(("x", 1))) == ["x"]


def test_of_lists_that_were_cut_only_the_rows_in_both_are_compared() -> None:
    fast, legacy = found(("a", 1), ("b", 2), count=3), found(("b", 3), ("c", 4), count=3)
    assert perfdiff.differing(fast, legacy) == ["b"]
    for cut, whole in ((3, None), (None, 3)):  # also where one way alone says that there are more
        fast, legacy = found(("a", 1), ("b", 2), count=cut), found(("b", 3), ("c", 4), count=whole)
        assert perfdiff.differing(fast, legacy) == ["b"]


def test_presence_is_told_from_content() -> None:
    one, heard, other = Row("a", 1), Row("a", 1, NOW + SECOND), Row("a", 2)
    assert perfdiff.same_content("a", Found(1, [one]), Found(1, [heard]))
    assert not perfdiff.same_content("a", Found(1, [one]), Found(1, [other]))
    assert perfdiff.same_content("a", Found(1, [one]), Found(0, []))  # listed one way only: its presence decides


def attached(*days: int, **changes: Any) -> list[Partition]:
    """Partitions of the days so many days ago."""
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
def test_the_history_is_known_as_far_back_as_it_has_no_gap(days: list[Partition], since: datetime) -> None:
    assert perfdiff.known_since(days, NOW, RETENTION) == since


def standing(
    status: datetime | None,
    history: datetime | None,
    *,
    late: bool = False,
    clock_wrong: bool = False,
    partial: bool = False,
    received: timedelta = 0 * SECOND,
    heard: timedelta = 0 * SECOND,
) -> dict[str, Any]:
    """A status and a newest row of the history; `received`, `heard`: by how much later the status' heartbeat arrived,
    and the device was last heard as the status has it."""
    return {
        "status_ts": status, "status_received_at": status and NOW + received,
        "history_ts": history, "history_received_at": history and NOW, "partial": partial,
        "status_heard_at": status and NOW + heard, "history_heard_at": history and NOW,
        "history_bucket": history and wire.bucket_of(history, 10), "late": late,
        "clock_wrong": clock_wrong if status else None,
    }  # fmt: skip


MINUTE_AGO = NOW - 60 * SECOND


@pytest.mark.parametrize(
    ("one", "excused"),
    [
        # wrong, whichever of them is
        (standing(MINUTE_AGO, MINUTE_AGO), None),  # the same arrival, and yet not the same values
        (standing(None, MINUTE_AGO), None),
        (standing(MINUTE_AGO, None), None),
        (standing(MINUTE_AGO, MINUTE_AGO - 10 * SECOND), None),
        (standing(MINUTE_AGO - DAY, MINUTE_AGO), None),
        (standing(SINCE - 30 * DAY, MINUTE_AGO), None),  # a status far back, where the history knows better
        (standing(MINUTE_AGO, SINCE - 30 * DAY), None),
        (standing(SINCE, None), None),
        (standing(MINUTE_AGO, MINUTE_AGO - 60 * SECOND, clock_wrong=True), None),
        # neither is
        (standing(MINUTE_AGO + 9 * SECOND, MINUTE_AGO), "same_bucket"),
        (standing(MINUTE_AGO, MINUTE_AGO, received=SECOND), "same_bucket"),
        (standing(MINUTE_AGO, MINUTE_AGO, clock_wrong=True), "same_bucket"),
        (standing(SINCE - SECOND, None), "beyond_history"),
        (standing(SINCE - SECOND, SINCE - DAY), "beyond_history"),
        (standing(None, SINCE - DAY), "beyond_history"),
        (standing(SINCE + SECOND, None, late=True), "late"),
        (standing(MINUTE_AGO, MINUTE_AGO - 10 * SECOND, partial=True), "partial"),
    ],
)
def test_what_is_excused_and_what_is_not(one: dict[str, Any], excused: str | None) -> None:
    assert perfdiff.excuse(one, SINCE, 10, same=False) == excused


def test_a_device_may_have_been_heard_again_by_a_duplicate_and_never_less_late() -> None:
    again, before = standing(MINUTE_AGO, MINUTE_AGO, heard=SECOND), standing(MINUTE_AGO, MINUTE_AGO, heard=-SECOND)
    assert perfdiff.excuse(again, SINCE, 10, same=True) == "heard_again"
    assert perfdiff.excuse(again, SINCE, 10, same=False) is None
    assert perfdiff.excuse(before, SINCE, 10, same=True) is None
