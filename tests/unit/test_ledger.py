"""What a transaction adds to the ledger agrees with a count of its heartbeats."""

from __future__ import annotations

from collections import Counter
from datetime import date

from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.heartbeat import Heartbeat, Key, key_of
from nexhb.ingest import batch, ledger
from nexhb.ingest.batch import Plan
from tests.support.heartbeats import AROUND_MIDNIGHT, recent_of

Counts = dict[date, tuple[int, int]]  # day → written, deduplicated


def expected(arrived: list[Heartbeat], plan: Plan, written: set[Key]) -> Counts:
    """Return the counts of each day, one heartbeat after another."""
    received = Counter(h.ts.date() for h in arrived)
    became = Counter(arrived[index].ts.date() for rows in plan.rows.values() for one, index in rows if one in written)
    return {day: (became[day], count - became[day]) for day, count in received.items()}


def draw(arrived: list[Heartbeat], data: st.DataObject) -> tuple[Plan, set[Key]]:
    """Return the plan of a batch of which some rows are already known, and the keys of the rows that the database
    accepts."""
    keys = sorted({key_of(h.device_no, h.bucket) for h in arrived})
    some = st.sets(st.sampled_from(keys)) if keys else st.just(set())
    plan = batch.make_plan(arrived, recent_of(data.draw(some)))
    return plan, set(plan.keys) - data.draw(some)


@settings(max_examples=300, deadline=None)
@given(AROUND_MIDNIGHT, st.data())
def test_the_written_and_deduplicated_heartbeats_of_each_day_are_counted(
    arrived: list[Heartbeat], data: st.DataObject
) -> None:
    plan, written = draw(arrived, data)
    days, rows, deduplicated = ledger.counts(arrived, plan, written)
    assert list(days) == sorted(days)
    counted = {day: (new, known) for day, new, known in zip(days, rows, deduplicated, strict=True)}
    assert counted == expected(arrived, plan, written)


@settings(max_examples=300, deadline=None)
@given(AROUND_MIDNIGHT, st.data())
def test_the_counts_of_all_planned_rows_and_their_correction_are_the_counts_of_the_written_rows(
    arrived: list[Heartbeat], data: st.DataObject
) -> None:
    plan, written = draw(arrived, data)
    total: Counts = {}
    for part in (ledger.counts(arrived, plan, plan.keys), ledger.correction(plan, written)):
        for day, new, known in zip(*part, strict=True):
            before = total.get(day, (0, 0))
            total[day] = (before[0] + new, before[1] + known)
    assert total == expected(arrived, plan, written)
