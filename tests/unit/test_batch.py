"""Heartbeats → the plan of one transaction, against a model that is too simple to be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from nexhb import batch, wire
from nexhb.batch import HISTORY_COLUMNS, Key, RecentKeys, key_of
from nexhb.wire import Heartbeat, Label, pack_moment, unpack_moment
from tests.unit.beats import FACTS, LABEL, NOON, beat

DIGEST_OF_FACTS = -976_026_567
MIDNIGHT = NOON.replace(hour=0)
EPOCH = datetime(2020, 1, 1, tzinfo=UTC)

# Few devices and half a minute on each side of a midnight: buckets, days and devices meet often.
heartbeats = st.lists(
    st.builds(
        beat,
        st.integers(1, 4),
        st.integers(-30_000, 30_000).map(lambda ms: MIDNIGHT + timedelta(milliseconds=ms)),
        battery_pct=st.integers(0, 100),
    ),
    max_size=30,
)


def recent_of(keys: Sequence[Key], capacity: int = 1_000) -> RecentKeys:
    """A memory that holds these keys."""
    recent = RecentKeys(capacity)
    recent.add(keys)
    return recent


def key(heartbeat: Heartbeat) -> tuple[int, int]:
    """What may be stored once."""
    return heartbeat.device_no, heartbeat.bucket


@settings(max_examples=500, deadline=None)
@given(heartbeats, st.data())
def test_a_plan_is_what_the_model_says(arrived: list[Heartbeat], data: st.DataObject) -> None:
    stored = data.draw(st.sets(st.sampled_from(sorted({key(h) for h in arrived})))) if arrived else set()
    plan = batch.make(arrived, recent_of([key_of(*one) for one in stored]))

    first: dict[tuple[int, int], int] = {}
    for index, heartbeat in enumerate(arrived):
        first.setdefault(key(heartbeat), index)
    expected = {index for one, index in first.items() if one not in stored}

    rows = [index for day in plan.rows.values() for _, index in day]
    assert sorted(rows) == sorted(expected)
    assert plan.duplicates == set(range(len(arrived))) - expected
    assert plan.keys == {key_of(*key(arrived[index])) for index in expected}
    for day, entries in plan.rows.items():
        assert entries
        assert all(arrived[index].ts.date() == day for _, index in entries)
        assert [one for one, _ in entries] == [key_of(*key(arrived[index])) for _, index in entries]
        assert [key(arrived[index]) for _, index in entries] == sorted(key(arrived[index]) for _, index in entries)

    for statuses in plan.rounds:
        assert [h.device_no for h in statuses] == sorted({h.device_no for h in statuses})
    written = [h for statuses in plan.rounds for h in statuses]
    for device_no in {h.device_no for h in arrived}:
        theirs = [h for h in arrived if h.device_no == device_no]
        newest = max(h.ts for h in theirs)
        assert any(h.ts == newest for h in written if h.device_no == device_no)
        assert plan.heard.get(device_no, newest) == max(h.received_at for h in theirs)


def test_the_first_of_a_bucket_is_the_row_and_the_newest_is_the_status_though_it_is_a_duplicate() -> None:
    arrived = [beat(ts=NOON + timedelta(seconds=second), battery_pct=50 + second) for second in (3, 8, 1)]
    plan = batch.make(arrived, RecentKeys(10))
    assert plan.rows == {date(2026, 11, 24): [(key_of(1, arrived[0].bucket), 0)]}
    assert (plan.duplicates, plan.rounds) == ({1, 2}, [[arrived[1]], [arrived[2]]])


def test_a_bucket_that_is_stored_already_gets_no_row_and_still_moves_the_status() -> None:
    stored = beat()
    plan = batch.make([beat(ts=NOON + timedelta(seconds=5))], recent_of([key_of(1, stored.bucket)]))
    assert (plan.rows, plan.duplicates) == ({}, {0})
    assert [[h.ts for h in statuses] for statuses in plan.rounds] == [[NOON + timedelta(seconds=5)]]


def test_nothing_comes_of_nothing() -> None:
    assert batch.make([], RecentKeys(10)) == batch.Plan({}, set(), [])


@given(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
)
def test_keys_are_ordered_as_their_pairs_and_no_two_pairs_share_one(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    assert (key_of(*one) < key_of(*other)) == (one < other)
    assert (key_of(*one) == key_of(*other)) == (one == other)


# ---- what was written a short while ago -------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20), st.lists(st.lists(st.integers(0, 200), max_size=8), max_size=60))
def test_recent_keys_hold_the_last_generation_and_never_more_than_two(capacity: int, adds: list[list[int]]) -> None:
    recent = RecentKeys(capacity)
    added: list[Key] = []
    for keys in adds:
        recent.add(keys)
        added += keys
        assert sum(one in recent for one in range(201)) < 2 * (capacity + 8)
        last = list(dict.fromkeys(reversed(added)))[:capacity]
        assert all(one in recent for one in last)
        assert not any(one in recent for one in set(range(201)) - set(added))
        assert all(recent.none_of({one, 201}) is (one not in recent) for one in range(201))


def test_a_key_is_forgotten_after_two_generations() -> None:
    recent = RecentKeys(3)
    recent.add([1, 2, 3])
    recent.add([4, 5])
    assert all(one in recent for one in (1, 2, 3, 4, 5))
    recent.add([6])
    assert [one in recent for one in range(1, 7)] == [False, False, False, True, True, True]


# ---- the arguments of its statements ----------------------------------------------------------------------------


def test_a_history_row_has_a_value_for_each_column_and_under_its_name() -> None:
    heartbeat = beat()
    row = dict(zip(HISTORY_COLUMNS, batch.history_row(heartbeat, 17), strict=True))
    assert row.pop("label_no") == 17
    assert [unpack_moment(row.pop(name)) for name in ("ts", "received_at")] == [heartbeat.ts, heartbeat.received_at]
    assert row == {name: getattr(heartbeat, name) for name in row}


def test_the_status_columns_are_one_sequence_a_column_and_unknown_texts_are_null() -> None:
    one, two = beat(1), beat(2, label=Label("", "", "", ""))
    columns = batch.status_columns([one, two])
    assert columns[0] == (1, 2)
    assert columns[1] == ("kiosk-1", "kiosk-2")
    assert [columns[n] for n in (7, 8, 13, 15)] == [
        ("wifi", None), ("Store-42", None), ("2.1.0", None), ("1.0.9", None),
    ]  # fmt: skip
    assert [column[0] for column in columns] == [
        1, "kiosk-1", pack_moment(one.ts), pack_moment(one.received_at), 87, True, 31.5, "wifi", "Store-42", one.ip,
        -67, 12_345_678, 1837, "2.1.0", True, "1.0.9", False, pack_moment(one.received_at), 31, DIGEST_OF_FACTS,
    ]  # fmt: skip
    later = one.received_at + timedelta(seconds=3)
    assert [*batch.status_columns([one, two], {2: later})[17]] == [pack_moment(one.received_at), pack_moment(later)]


@settings(max_examples=300, deadline=None)
@given(heartbeats, st.data())
def test_the_ledger_counts_each_day_what_became_a_row_and_what_did_not(
    arrived: list[Heartbeat], data: st.DataObject
) -> None:
    keys = sorted({key_of(*key(h)) for h in arrived})
    stored = data.draw(st.sets(st.sampled_from(keys))) if keys else set()
    plan = batch.make(arrived, recent_of(list(stored)))
    written = plan.keys - (data.draw(st.sets(st.sampled_from(keys))) if keys else set())
    days, rows, deduplicated = batch.ledger_columns(arrived, plan, written)
    received = Counter(h.ts.date() for h in arrived)
    became = Counter(arrived[index].ts.date() for rows in plan.rows.values() for one, index in rows if one in written)
    assert list(days) == sorted(received)
    assert list(rows) == [became[day] for day in days]
    assert list(deduplicated) == [received[day] - became[day] for day in days]


@given(
    st.integers(-31 * 86_400 * 10**6, 67 * 365 * 86_400 * 10**6).map(lambda us: EPOCH + timedelta(microseconds=us)),
    st.sampled_from([size for size in range(1, 3_601) if 86_400 % size == 0]),
)
def test_a_heartbeats_day_is_its_buckets(ts: datetime, bucket_seconds: int) -> None:
    made = structs.replace(beat(ts=ts), bucket=wire.bucket_of(ts, bucket_seconds))
    assert batch.day_of(made) == ts.date()


def test_facts_are_written_for_the_devices_that_are_asked_for() -> None:
    one, two = beat(1), beat(2, facts=FACTS._replace(alias="Store 43"))
    assert batch.facts_columns([one, two], {2}) == tuple((value,) for value in (2, two.ts, *two.facts))


def test_a_digest_of_facts_changes_with_each_of_them_and_is_the_same_in_every_process() -> None:
    facts = [FACTS] + [FACTS._replace(**{name: None}) for name in FACTS._fields]
    facts += [FACTS._replace(alias="Store 4"), FACTS._replace(alias="", android_version="Store 42")]
    assert len({batch.facts_digest(one) for one in facts}) == len(facts)
    assert batch.facts_digest(FACTS) == DIGEST_OF_FACTS
    assert batch.facts_digest(wire.DeviceFacts(None, None, None, None, None, None, None)) is None


# ---- what is newer ----------------------------------------------------------------------------------------------


def live(seconds: float, clock_ahead_s: float = 0, *, booted: float = -1_000, **changes: object) -> Heartbeat:
    """A heartbeat that is received as it is made, so many seconds after noon, by a device whose clock is ahead."""
    received_at = NOON + timedelta(seconds=seconds)
    made = structs.replace(beat(ts=received_at + timedelta(seconds=clock_ahead_s)), received_at=received_at)
    return structs.replace(made, **({"uptime_s": round(seconds - booted)} | changes))


def queued(made: Heartbeat, seconds: float) -> Heartbeat:
    """The same, received only then."""
    return structs.replace(made, received_at=NOON + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("known", "new", "newer"),
    [
        (live(0), live(60), True),
        (live(0), live(60, -1_500), True),  # its clock was set back by 25 minutes
        (live(0, 240), live(60), True),  # and to the right time
        (live(0), live(60, -1_500, uptime_s=None), False),  # without an uptime, ts decides
        (live(0, uptime_s=None), live(60, -1_500), False),
        (live(0), live(120, -1_500, booted=-1_060), True),  # a minute's difference at the most
        (live(0), live(120, -1_500, booted=-1_061), False),
        (live(0), live(120, -1_500, booted=-939), False),
        (live(0), queued(live(-600), 1), False),  # a queue of the same boot
        (live(0), queued(live(-30), 1), False),  # made half a minute before: within the tolerance, but not later
        (live(0, booted=-10), queued(live(-3_600, booted=-90_000), 1), False),  # of the boot before
        (live(0), live(0), False),  # the very same
        (live(40 * 86_400, clock_wrong=True), live(60), True),  # taken by a daemon that was 40 days ahead
        (live(40 * 86_400), live(60), True),
        (live(0), live(-3 * 86_400, clock_wrong=True, uptime_s=1), False),  # the receipt's clock is three days behind
        (live(0), queued(live(-4 * 86_400), -3 * 86_400), False),  # and what was queued a day before it
        (
            live(0, clock_wrong=True),
            live(-3 * 86_400, clock_wrong=True, uptime_s=1),
            True,
        ),  # a clock that is never right
        (live(90_000), live(0, booted=0), False),  # 25 hours, and no more
    ],
)
def test_what_is_newer(known: Heartbeat, new: Heartbeat, newer: bool) -> None:
    assert batch.is_newer(known, new) is newer


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(-400, 0), st.booleans(), st.booleans()), min_size=1))
def test_rounds_come_to_what_one_heartbeat_after_the_other_comes_to(said: list[tuple[int, int, bool, bool]]) -> None:
    """Whatever of it is one batch: fields that a heartbeat leaves out stay as the one before it said."""
    arrived = [
        structs.replace(
            live(at, ahead),
            battery_pct=at % 101 if battery else None,
            label=LABEL._replace(sections=31 if battery else 30),
            facts=FACTS._replace(alias=f"Store {at}" if alias else None),
        )
        for at, ahead, battery, alias in sorted(said)
    ]
    one_by_one = wrote([[h] for h in arrived])
    assert wrote(batch.make(arrived, RecentKeys(10)).rounds) == one_by_one


def wrote(rounds: list[list[Heartbeat]]) -> tuple[datetime, int | None, str | None]:
    """What upsert_last_status makes of them, in the fields that the test changes."""
    known, battery, alias = rounds[0][0], rounds[0][0].battery_pct, rounds[0][0].facts.alias
    for [new] in rounds[1:]:
        if batch.is_newer(known, new):
            known = new
            battery = new.battery_pct if new.label.sections & wire.BATTERY else battery
            alias = new.facts.alias or alias
    return known.ts, battery, alias


def test_unknown_labels_are_named_once_and_sorted() -> None:
    labels = [Label("2", "", "", ""), LABEL, Label("1", "", "", "b"), Label("1", "", "", "a")]
    found = batch.unknown_labels([*labels, *labels], {LABEL: 1})
    assert found == [Label("1", "", "", "a"), Label("1", "", "", "b"), Label("2", "", "", "")]
