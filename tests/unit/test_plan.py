"""The nightly plan: from what there is to what is to be done."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexhb.jobs import plan
from nexhb.jobs.plan import Day, Kind, Rules, Step, Witnesses

NOW = datetime(2026, 6, 15, 3, 0, tzinfo=UTC)
TODAY = NOW.date()
RULES = Rules(retention_days=90, days_ahead=14, accept_past=timedelta(days=7))


def day(back: int, **changes: object) -> Day:
    """A settled, attached day so many days ago; `changes` make it another."""
    start = datetime.combine(TODAY - timedelta(days=back), time(), UTC)
    settled = Day(
        f"hb_{start:%Y%m%d}", start, start + timedelta(days=1), "active", attached=True, present=True,
        counted_at=NOW, frozen=True,
    )  # fmt: skip
    return replace(settled, **changes)  # type: ignore[arg-type]


def settled(past: int = 90) -> list[Day]:
    """Everything that should be there, and nothing else."""
    return [day(back) for back in range(past, -15, -1)]


def steps(days: list[Day], *kinds: Kind) -> list[Step]:
    """Those steps of the plan that are of these kinds."""
    return [step for step in plan.nightly(days, NOW, RULES) if step.kind in kinds]


def targets(days: list[Day], kind: Kind) -> list[str]:
    """What they are about."""
    return [step.target for step in steps(days, kind)]


def test_a_settled_house_needs_only_its_upkeep() -> None:
    found = {step.kind for step in plan.nightly(settled(), NOW, RULES)}
    upkeep = {Kind.COUNT, Kind.VACUUM, Kind.ANALYZE, Kind.INACTIVE, Kind.DRILL, Kind.PRUNE}
    assert found == upkeep
    assert len(settled()) == 105


def test_a_new_house_gets_the_accept_window_and_the_days_ahead() -> None:
    made = [step.make for step in steps([], Kind.CREATE)]
    assert made == [TODAY + timedelta(days=n) for n in range(-7, 15)]


def test_gaps_are_filled_from_the_oldest_day_that_is_there() -> None:
    days = [one for one in settled(30) if one.start.date() not in {TODAY - timedelta(days=20), TODAY}]
    assert [step.make for step in steps(days, Kind.CREATE)] == [TODAY - timedelta(days=20), TODAY]


@pytest.mark.parametrize("state", ["archived", "archive_failed", "dropped"])
def test_a_day_that_is_gone_is_never_made_again(state: str) -> None:
    gone = day(3, state=state, attached=False, present=False)
    assert steps([one for one in settled() if one.start != gone.start] + [gone], Kind.CREATE) == []


def test_a_table_that_was_dropped_by_hand_is_made_again() -> None:
    lost = day(3, attached=False, present=False)
    made = steps([one for one in settled() if one.start != lost.start] + [lost], Kind.CREATE)
    assert [step.make for step in made] == [lost.start.date()]


def test_the_91st_day_goes_and_the_90th_stays() -> None:
    days = [day(92), day(91), *settled()]
    assert targets(days, Kind.ARCHIVE) == [day(92).name, day(91).name]
    assert [step.needs for step in steps(days, Kind.DROP)] == [Kind.ARCHIVE, Kind.ARCHIVE]


def test_archiving_is_followed_by_its_own_drop_the_oldest_first() -> None:
    found = steps([day(91), day(95)], Kind.ARCHIVE, Kind.DROP)
    assert [(step.kind, step.target) for step in found] == [
        (Kind.ARCHIVE, day(95).name), (Kind.DROP, day(95).name),
        (Kind.ARCHIVE, day(91).name), (Kind.DROP, day(91).name),
    ]  # fmt: skip


def test_what_an_earlier_run_archived_is_dropped_without_being_archived_again() -> None:
    left = day(91, state="archived", attached=False)
    [step] = steps([left], Kind.ARCHIVE, Kind.DROP)
    assert (step.kind, step.needs) == (Kind.DROP, None)


def test_an_archived_day_that_somebody_attached_again_is_archived_again_before_its_drop() -> None:
    found = steps([day(91, state="archived")], Kind.ARCHIVE, Kind.DROP)
    assert [(step.kind, step.needs) for step in found] == [(Kind.ARCHIVE, None), (Kind.DROP, Kind.ARCHIVE)]


def test_a_failed_archive_is_tried_again() -> None:
    failed = day(91, state="archive_failed", attached=False)
    assert [step.reason for step in steps([failed], Kind.ARCHIVE)] == ["its last try failed"]


def test_a_day_that_could_not_be_archived_and_is_kept_again_is_no_failure_any_more() -> None:
    assert targets([day(3, state="archive_failed")], Kind.ADOPT) == [day(3).name]
    assert targets([day(91, state="archive_failed")], Kind.ADOPT) == []


def test_a_detached_day_is_on_its_way_out_whatever_its_age() -> None:
    assert targets([day(3, attached=False)], Kind.ARCHIVE) == [day(3).name]


def test_a_foreign_table_of_a_days_name_is_not_touched() -> None:
    assert steps([day(95, state="dropped", attached=False)], Kind.ARCHIVE, Kind.DROP) == []
    attached = day(95, state="dropped", counted_at=None)
    assert steps([attached], Kind.ARCHIVE, Kind.DROP, Kind.COUNT) == [], "its count is the archive's"


def test_an_interrupted_detach_comes_first_and_its_archive_needs_it() -> None:
    pending = day(91, detach_pending=True)
    found = plan.nightly([pending], NOW, RULES)
    assert (found[0].kind, found[0].target) == (Kind.FINALIZE, pending.name)
    [archive] = [step for step in found if step.kind is Kind.ARCHIVE]
    assert archive.needs is Kind.FINALIZE
    pending = day(9, detach_pending=True, counted_at=None, frozen=False)
    assert pending.name not in [step.target for step in steps([pending], Kind.COUNT, Kind.FREEZE, Kind.VACUUM)]
    pending = day(2, detach_pending=True)
    assert pending.name not in targets([pending], Kind.VACUUM)


def test_a_restored_day_stays_until_it_is_released() -> None:
    restored = day(95, restored=True)
    assert steps([restored], Kind.ARCHIVE, Kind.DROP) == []
    assert targets([replace(restored, restored=False)], Kind.ARCHIVE) == [restored.name]


def test_a_restored_day_makes_no_gap_of_those_between() -> None:
    assert steps([day(300, restored=True), *settled()], Kind.CREATE) == []


def test_rows_are_counted_as_long_as_they_may_change() -> None:
    assert targets([day(20, counted_at=None)], Kind.COUNT) == [day(20).name]
    assert targets([day(20, counted_at=day(11).start)], Kind.COUNT) == []
    assert targets([day(20, counted_at=day(13).start)], Kind.COUNT) == [day(20).name]
    assert targets([day(-2, counted_at=None)], Kind.COUNT) == []


def test_a_day_is_frozen_once_when_no_heartbeat_can_come_for_it() -> None:
    assert targets([day(8, frozen=False)], Kind.FREEZE) == [day(8).name]
    assert targets([day(7, frozen=False)], Kind.FREEZE) == []
    assert targets([day(8)], Kind.FREEZE) == []


def test_the_last_seven_days_and_the_status_are_vacuumed() -> None:
    found = targets(settled(), Kind.VACUUM)
    assert found == [*(day(back).name for back in range(7, -1, -1)), "device_last_status"]


def test_late_heartbeats_are_brought_in_behind_the_archiving() -> None:
    found = [step.kind for step in plan.nightly([day(91, late=3)], NOW, RULES)]
    assert found.index(Kind.LATE) > found.index(Kind.DROP)


def test_a_week_in_one_partition_is_archived_whole_and_fills_its_seven_days() -> None:
    week = replace(day(6), name="a week", end=day(0).end)
    assert [step.make for step in steps([week], Kind.CREATE)] == [
        TODAY - timedelta(days=7),
        *(TODAY + timedelta(days=n) for n in range(1, 15)),
    ]
    assert targets([replace(week, start=day(97).start, end=day(90).start)], Kind.ARCHIVE) == ["a week"]


states = st.sampled_from(["active", "archived", "archive_failed", "dropped", "unknown"])
any_day = st.builds(
    day,
    st.integers(-20, 120),
    state=states,
    attached=st.booleans(),
    present=st.booleans(),
    detach_pending=st.booleans(),
    restored=st.booleans(),
    late=st.integers(0, 3),
    frozen=st.booleans(),
    counted_at=st.none() | st.just(NOW),
)


@given(st.lists(any_day, unique_by=lambda one: one.start, max_size=30))
def test_whatever_there_is_nothing_is_dropped_that_was_not_archived_and_nothing_young_leaves(days: list[Day]) -> None:
    days = [replace(one, attached=one.attached and one.present) for one in days]
    found = plan.nightly(days, NOW, RULES)
    by_name = {one.name: one for one in days}
    for step in found:
        if step.kind is Kind.DROP:
            assert step.needs is Kind.ARCHIVE or by_name[step.target].state == "archived"
            assert not by_name[step.target].restored
        if step.kind is Kind.ARCHIVE:
            one = by_name[step.target]
            young = one.end.date() > TODAY - timedelta(days=90)
            assert not young or not one.attached or one.detach_pending
    made = [step.make for step in found if step.kind is Kind.CREATE]
    there: set[date] = {one.start.date() for one in days if one.attached or one.present}
    assert len(made) == len(set(made))
    assert not there & set(made)


# ---- whether the clock is to be believed ----------------------------------------------------------------------------

YESTERDAY = TODAY - timedelta(days=1)
LAST_NIGHT = Witnesses(NOW - timedelta(days=1), (YESTERDAY, TODAY))


def doubted(days: list[Day], leaving: int, witnesses: Witnesses = LAST_NIGHT) -> str | None:
    """What is said of a run that archives the oldest `leaving` of these days."""
    return plan.doubt(days, [Step(Kind.ARCHIVE, one.name, "") for one in days[:leaving]], NOW, witnesses)


def test_a_night_like_any_other_is_not_doubted() -> None:
    assert doubted(settled(), 1) is None
    assert doubted(settled(), 0, Witnesses(None, ())) is None, "nothing leaves"


def test_neither_a_large_share_of_few_days_nor_a_small_one_of_many_is_doubted() -> None:
    """A small house, or a retention that was shortened by some days."""
    assert doubted(settled(-6), 8) is None
    assert "9 of the 21" in (doubted(settled(6), 9) or "")
    assert doubted(settled(), 35) is None
    assert "36 of the 105" in (doubted(settled(), 36) or "")


def test_what_passed_since_the_last_run_is_no_doubt() -> None:
    ten_days = Witnesses(NOW - timedelta(days=10), ())
    assert doubted(settled(6), 17, ten_days) is None
    assert "explains 10 of them" in (doubted(settled(6), 18, ten_days) or "")


def test_a_restored_day_is_none_of_those_that_stand() -> None:
    restored = [day(back, restored=True) for back in range(300, 200, -1)]
    days = settled(6)
    assert "9 of the 21" in (doubted([*days, *restored], 9) or "")
    assert doubted([*restored, *days], 9) is None


def test_a_gap_is_looked_for_between_whatever_bears_witness() -> None:
    assert doubted(settled(), 1, Witnesses(NOW - timedelta(days=14), ())) is None
    assert "15 days" in (doubted(settled(), 1, Witnesses(NOW - timedelta(days=15), ())) or "")
    weekly = tuple(TODAY - timedelta(days=7 * n) for n in range(10))
    assert doubted(settled(), 1, Witnesses(None, weekly)) is None


def test_what_a_clock_that_was_ahead_wrote_bears_no_witness() -> None:
    year = timedelta(days=365)
    assert doubted(settled(), 1, Witnesses(NOW - timedelta(days=1), (YESTERDAY, TODAY + year))) is None
    assert doubted(settled(), 1, Witnesses(NOW + year, (YESTERDAY,))) is None
