"""The nightly plan: which steps follow from which partitions."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexhb.jobs import plan
from nexhb.jobs.plan import Day, NightlyRules, Step, StepKind, TimeEvidence

NOW = datetime(2026, 6, 15, 3, 0, tzinfo=UTC)
TODAY = NOW.date()
RULES = NightlyRules(retention_days=90, days_ahead=14, accept_past=timedelta(days=7))


def day(back: int, **changes: object) -> Day:
    """A complete, attached day, `back` days ago, with `changes`."""
    start = datetime.combine(TODAY - timedelta(days=back), time(), UTC)
    settled = Day(
        f"hb_{start:%Y%m%d}", start, start + timedelta(days=1), "active", attached=True, present=True,
        counted_at=NOW, frozen=True,
    )  # fmt: skip
    return replace(settled, **changes)  # type: ignore[arg-type]


def settled(past: int = 90) -> list[Day]:
    """The partitions of an installation that needs no changes."""
    return [day(back) for back in range(past, -15, -1)]


def steps(days: list[Day], *kinds: StepKind) -> list[Step]:
    """The steps of the plan that have these kinds."""
    return [step for step in plan.nightly(days, NOW, RULES) if step.kind in kinds]


def targets(days: list[Day], kind: StepKind) -> list[str]:
    """The targets of the steps of this kind."""
    return [step.target for step in steps(days, kind)]


def test_a_complete_installation_needs_only_upkeep() -> None:
    planned = {step.kind for step in plan.nightly(settled(), NOW, RULES)}
    upkeep = {StepKind.COUNT, StepKind.VACUUM, StepKind.ANALYZE, StepKind.INACTIVE, StepKind.DRILL, StepKind.PRUNE}
    assert planned == upkeep
    assert len(settled()) == 105


def test_a_new_installation_gets_the_accepted_past_and_the_days_ahead() -> None:
    made = [step.new_day for step in steps([], StepKind.CREATE)]
    assert made == [TODAY + timedelta(days=n) for n in range(-7, 15)]


def test_gaps_are_filled_from_the_oldest_attached_day() -> None:
    days = [one for one in settled(30) if one.start.date() not in {TODAY - timedelta(days=20), TODAY}]
    assert [step.new_day for step in steps(days, StepKind.CREATE)] == [TODAY - timedelta(days=20), TODAY]


@pytest.mark.parametrize("state", ["archived", "archive_failed", "dropped"])
def test_an_archived_day_is_never_created_again(state: str) -> None:
    gone = day(3, state=state, attached=False, present=False)
    assert steps([one for one in settled() if one.start != gone.start] + [gone], StepKind.CREATE) == []


def test_a_table_that_was_dropped_by_hand_is_created_again() -> None:
    lost = day(3, attached=False, present=False)
    made = steps([one for one in settled() if one.start != lost.start] + [lost], StepKind.CREATE)
    assert [step.new_day for step in made] == [lost.start.date()]


def test_the_91st_day_is_archived_and_the_90th_is_kept() -> None:
    days = [day(92), day(91), *settled()]
    assert targets(days, StepKind.ARCHIVE) == [day(92).name, day(91).name]
    assert [step.needs for step in steps(days, StepKind.DROP)] == [(StepKind.ARCHIVE,), (StepKind.ARCHIVE,)]


def test_archiving_is_followed_by_its_own_drop_the_oldest_first() -> None:
    planned = steps([day(91), day(95)], StepKind.ARCHIVE, StepKind.DROP)
    assert [(step.kind, step.target) for step in planned] == [
        (StepKind.ARCHIVE, day(95).name), (StepKind.DROP, day(95).name),
        (StepKind.ARCHIVE, day(91).name), (StepKind.DROP, day(91).name),
    ]  # fmt: skip


def test_what_an_earlier_run_archived_is_dropped_without_being_archived_again() -> None:
    left = day(91, state="archived", attached=False)
    [step] = steps([left], StepKind.ARCHIVE, StepKind.DROP)
    assert (step.kind, step.needs) == (StepKind.DROP, ())


def test_an_archived_day_that_somebody_attached_again_is_archived_again_before_its_drop() -> None:
    planned = steps([day(91, state="archived")], StepKind.ARCHIVE, StepKind.DROP)
    assert [(step.kind, step.needs) for step in planned] == [
        (StepKind.ARCHIVE, (StepKind.FINALIZE, StepKind.UPTIME)),
        (StepKind.DROP, (StepKind.ARCHIVE,)),
    ]


def test_a_failed_archive_is_tried_again() -> None:
    failed = day(91, state="archive_failed", attached=False)
    assert [step.reason for step in steps([failed], StepKind.ARCHIVE)] == ["the last attempt failed"]


def test_a_failed_day_that_the_retention_keeps_again_is_no_longer_a_failure() -> None:
    assert targets([day(3, state="archive_failed")], StepKind.REGISTER) == [day(3).name]
    assert targets([day(91, state="archive_failed")], StepKind.REGISTER) == []


def test_a_detached_day_is_archived_whatever_its_age() -> None:
    assert targets([day(3, attached=False)], StepKind.ARCHIVE) == [day(3).name]


def test_a_foreign_table_of_a_days_name_is_not_touched() -> None:
    assert steps([day(95, state="dropped", attached=False)], StepKind.ARCHIVE, StepKind.DROP) == []
    attached = day(95, state="dropped", counted_at=None)
    assert steps([attached], StepKind.ARCHIVE, StepKind.DROP, StepKind.COUNT) == [], (
        "its recorded count is that of the archive"
    )


def test_the_uptimes_of_a_day_are_made_before_the_day_is_archived() -> None:
    old = replace(day(91), uptime_due="not made yet")
    planned = plan.nightly([*settled(), old], NOW, RULES)
    kinds = [step.kind for step in planned if step.target == old.name]
    assert kinds.index(StepKind.UPTIME) < kinds.index(StepKind.ARCHIVE)
    [archive] = steps([*settled(), old], StepKind.ARCHIVE)
    assert StepKind.UPTIME in archive.needs


def test_an_interrupted_detach_comes_first_and_its_archive_needs_it() -> None:
    pending = day(91, detach_pending=True)
    planned = plan.nightly([pending], NOW, RULES)
    assert (planned[0].kind, planned[0].target) == (StepKind.FINALIZE, pending.name)
    [archive] = [step for step in planned if step.kind is StepKind.ARCHIVE]
    assert StepKind.FINALIZE in archive.needs
    pending = day(9, detach_pending=True, counted_at=None, frozen=False)
    assert pending.name not in [
        step.target for step in steps([pending], StepKind.COUNT, StepKind.FREEZE, StepKind.VACUUM)
    ]
    pending = day(2, detach_pending=True)
    assert pending.name not in targets([pending], StepKind.VACUUM)


def test_a_restored_day_stays_until_it_is_released() -> None:
    restored = day(95, restored=True)
    assert steps([restored], StepKind.ARCHIVE, StepKind.DROP) == []
    assert targets([replace(restored, restored=False)], StepKind.ARCHIVE) == [restored.name]


def test_the_days_between_a_restored_day_and_the_others_are_not_gaps() -> None:
    assert steps([day(300, restored=True), *settled()], StepKind.CREATE) == []


def test_rows_are_counted_as_long_as_they_may_change() -> None:
    assert targets([day(20, counted_at=None)], StepKind.COUNT) == [day(20).name]
    assert targets([day(20, counted_at=day(11).start)], StepKind.COUNT) == []
    assert targets([day(20, counted_at=day(13).start)], StepKind.COUNT) == [day(20).name]
    assert targets([day(-2, counted_at=None)], StepKind.COUNT) == []


def test_a_day_is_frozen_once_when_no_more_heartbeats_are_accepted_for_it() -> None:
    assert targets([day(8, frozen=False)], StepKind.FREEZE) == [day(8).name]
    assert targets([day(7, frozen=False)], StepKind.FREEZE) == []
    assert targets([day(8)], StepKind.FREEZE) == []


def test_the_last_seven_days_and_the_status_are_vacuumed() -> None:
    planned = targets(settled(), StepKind.VACUUM)
    assert planned == [*(day(back).name for back in range(7, -1, -1)), "device_last_status"]


def test_late_heartbeats_are_moved_after_the_archiving() -> None:
    planned = [step.kind for step in plan.nightly([day(91, late=3)], NOW, RULES)]
    assert planned.index(StepKind.LATE) > planned.index(StepKind.DROP)


def test_a_week_in_one_partition_is_archived_whole_and_fills_its_seven_days() -> None:
    week = replace(day(6), name="a week", end=day(0).end)
    assert [step.new_day for step in steps([week], StepKind.CREATE)] == [
        TODAY - timedelta(days=7),
        *(TODAY + timedelta(days=n) for n in range(1, 15)),
    ]
    assert targets([replace(week, start=day(97).start, end=day(90).start)], StepKind.ARCHIVE) == ["a week"]


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
def test_no_plan_drops_a_day_that_was_not_archived_or_archives_a_young_one(days: list[Day]) -> None:
    days = [replace(one, attached=one.attached and one.present) for one in days]
    planned = plan.nightly(days, NOW, RULES)
    by_name = {one.name: one for one in days}
    for step in planned:
        if step.kind is StepKind.DROP:
            assert step.needs == (StepKind.ARCHIVE,) or by_name[step.target].state == "archived"
            assert not by_name[step.target].restored
        if step.kind is StepKind.ARCHIVE:
            one = by_name[step.target]
            young = one.end.date() > TODAY - timedelta(days=90)
            assert not young or not one.attached or one.detach_pending
    made = [step.new_day for step in planned if step.kind is StepKind.CREATE]
    existing: set[date] = {one.start.date() for one in days if one.attached or one.present}
    assert len(made) == len(set(made))
    assert not existing & set(made)


# ---- whether the clock can be trusted -------------------------------------------------------------------------------

YESTERDAY = TODAY - timedelta(days=1)
LAST_NIGHT = TimeEvidence(NOW - timedelta(days=1), (YESTERDAY, TODAY))


def confirmation(days: list[Day], leaving: int, evidence: TimeEvidence = LAST_NIGHT) -> str | None:
    """Return why a run that archives the oldest `leaving` of these days needs a confirmation; None if it needs none."""
    return plan.confirmation_reason(
        days, [Step(StepKind.ARCHIVE, one.name, "") for one in days[:leaving]], NOW, evidence
    )


def test_an_ordinary_night_needs_no_confirmation() -> None:
    assert confirmation(settled(), 1) is None
    assert confirmation(settled(), 0, TimeEvidence(None, ())) is None, "nothing leaves"


def test_a_large_share_of_few_days_or_a_small_share_of_many_needs_no_confirmation() -> None:
    """With few days in the database, a normal night may archive a large share of them. After the retention was
    shortened by some days, a night archives a small share of many days."""
    assert confirmation(settled(-6), 8) is None
    assert "9 of the 21" in (confirmation(settled(6), 9) or "")
    assert confirmation(settled(), 35) is None
    assert "36 of the 105" in (confirmation(settled(), 36) or "")


def test_days_that_passed_since_the_last_run_need_no_confirmation() -> None:
    ten_days = TimeEvidence(NOW - timedelta(days=10), ())
    assert confirmation(settled(6), 17, ten_days) is None
    assert "explains 10 of them" in (confirmation(settled(6), 18, ten_days) or "")


def test_a_restored_day_does_not_count_as_an_attached_one() -> None:
    restored = [day(back, restored=True) for back in range(300, 200, -1)]
    days = settled(6)
    assert "9 of the 21" in (confirmation([*days, *restored], 9) or "")
    assert confirmation([*restored, *days], 9) is None


def test_gaps_are_measured_between_runs_and_days_with_heartbeats() -> None:
    assert confirmation(settled(), 1, TimeEvidence(NOW - timedelta(days=14), ())) is None
    assert "15 days" in (confirmation(settled(), 1, TimeEvidence(NOW - timedelta(days=15), ())) or "")
    weekly = tuple(TODAY - timedelta(days=7 * n) for n in range(10))
    assert confirmation(settled(), 1, TimeEvidence(None, weekly)) is None


def test_times_written_by_a_clock_that_was_ahead_are_no_evidence() -> None:
    year = timedelta(days=365)
    assert confirmation(settled(), 1, TimeEvidence(NOW - timedelta(days=1), (YESTERDAY, TODAY + year))) is None
    assert confirmation(settled(), 1, TimeEvidence(NOW + year, (YESTERDAY,))) is None
