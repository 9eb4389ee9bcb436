"""The plan of one transaction, compared with a model that is too simple to be wrong."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from nexhb.heartbeat import (
    BATTERY,
    CONTENT,
    HISTORY_COLUMNS,
    DeviceFacts,
    Heartbeat,
    Key,
    Label,
    bucket_of,
    history_row,
    key_of,
)
from nexhb.ingest import batch
from nexhb.ingest.batch import RecentKeys
from nexhb.postgres.codecs import pack_moment, unpack_moment
from tests.support.heartbeats import AROUND_MIDNIGHT, FACTS, LABEL, NOON, beat, recent_of

DIGEST_OF_FACTS = -976_026_567
EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


def key(heartbeat: Heartbeat) -> tuple[int, int]:
    """Return the key, which the history stores once."""
    return heartbeat.device_no, heartbeat.bucket


@settings(max_examples=500, deadline=None)
@given(AROUND_MIDNIGHT, st.data())
def test_a_plan_agrees_with_the_model(arrived: list[Heartbeat], data: st.DataObject) -> None:
    stored = data.draw(st.sets(st.sampled_from(sorted({key(h) for h in arrived})))) if arrived else set()
    plan = batch.make_plan(arrived, recent_of([key_of(*one) for one in stored]))

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
        assert plan.last_received.get(device_no, newest) == max(h.received_at for h in theirs)


def test_the_first_of_a_bucket_becomes_the_row_and_the_newest_the_status_even_if_it_is_a_duplicate() -> None:
    arrived = [beat(ts=NOON + timedelta(seconds=second), battery_pct=50 + second) for second in (3, 8, 1)]
    plan = batch.make_plan(arrived, RecentKeys(10))
    assert plan.rows == {date(2026, 11, 24): [(key_of(1, arrived[0].bucket), 0)]}
    assert (plan.duplicates, plan.rounds) == ({1, 2}, [[arrived[1]], [arrived[2]]])


def test_a_heartbeat_of_a_stored_bucket_gets_no_row_but_still_updates_the_status() -> None:
    stored = beat()
    plan = batch.make_plan([beat(ts=NOON + timedelta(seconds=5))], recent_of([key_of(1, stored.bucket)]))
    assert (plan.rows, plan.duplicates) == ({}, {0})
    assert [[h.ts for h in statuses] for statuses in plan.rounds] == [[NOON + timedelta(seconds=5)]]


def test_the_plan_of_no_heartbeats_is_empty() -> None:
    assert batch.make_plan([], RecentKeys(10)) == batch.Plan({}, set(), [])


@given(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
)
def test_keys_sort_like_their_pairs_and_are_unique(left: tuple[int, int], right: tuple[int, int]) -> None:
    assert (key_of(*left) < key_of(*right)) == (left < right)
    assert (key_of(*left) == key_of(*right)) == (left == right)


# ---- recent keys -------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20), st.lists(st.lists(st.integers(0, 200), max_size=8), max_size=60))
def test_recent_keys_hold_the_last_generation_and_at_most_two(capacity: int, adds: list[list[int]]) -> None:
    recent = RecentKeys(capacity)
    added: list[Key] = []
    for keys in adds:
        recent.add(keys)
        added += keys
        assert sum(one in recent for one in range(201)) < 2 * (capacity + 8)
        last = list(dict.fromkeys(reversed(added)))[:capacity]
        assert all(one in recent for one in last)
        assert not any(one in recent for one in set(range(201)) - set(added))
        assert all(recent.isdisjoint({one, 201}) is (one not in recent) for one in range(201))


def test_a_key_is_forgotten_after_two_generations() -> None:
    recent = RecentKeys(3)
    recent.add([1, 2, 3])
    recent.add([4, 5])
    assert all(one in recent for one in (1, 2, 3, 4, 5))
    recent.add([6])
    assert [one in recent for one in range(1, 7)] == [False, False, False, True, True, True]


# ---- the arguments of the statements ------------------------------------------------------------------------------


def test_a_history_row_has_the_value_of_each_column_in_its_place() -> None:
    heartbeat = beat()
    row = dict(zip(HISTORY_COLUMNS, history_row(heartbeat, 17, pack_moment), strict=True))
    assert row.pop("label_no") == 17
    assert [unpack_moment(row.pop(name)) for name in ("ts", "received_at")] == [heartbeat.ts, heartbeat.received_at]
    assert row == {name: getattr(heartbeat, name) for name in row}


def test_there_is_one_sequence_per_status_column_and_unknown_texts_are_null() -> None:
    one, two = beat(1), beat(2, label=Label("", "", "", ""))
    columns = batch.status_columns([one, two])
    assert columns[0] == [1, 2]
    assert columns[1] == ["kiosk-1", "kiosk-2"]
    names = [column.name for column in CONTENT]
    content = dict(zip(names, columns[8:], strict=True))
    assert [content[name] for name in ("network_type", "ssid", "unity_pkg_version", "agent_version")] == [
        ["wifi", None], ["Store-42", None], ["2.1.0", None], ["1.0.9", None],
    ]  # fmt: skip
    assert [column[0] for column in columns[:8]] == [
        1, "kiosk-1", pack_moment(one.ts), pack_moment(one.received_at), False, pack_moment(one.received_at), 31,
        DIGEST_OF_FACTS,
    ]  # fmt: skip
    assert [content[name][0] for name in names] == [
        getattr(one.label if name in Label._fields else one, name) for name in names
    ]
    later = one.received_at + timedelta(seconds=3)
    assert batch.status_columns([one, two], {2: later})[5] == [pack_moment(one.received_at), pack_moment(later)]


@given(
    st.integers(-31 * 86_400 * 10**6, 67 * 365 * 86_400 * 10**6).map(lambda us: EPOCH + timedelta(microseconds=us)),
    st.sampled_from([size for size in range(1, 3_601) if 86_400 % size == 0]),
)
def test_the_day_of_a_heartbeat_is_the_day_of_its_bucket(ts: datetime, bucket_seconds: int) -> None:
    made = structs.replace(beat(ts=ts), bucket=bucket_of(ts, bucket_seconds))
    assert batch.day_of(made) == ts.date()


def test_facts_columns_hold_only_the_given_devices() -> None:
    one, two = beat(1), beat(2, facts=FACTS._replace(alias="Store 43"))
    assert batch.facts_columns([one, two], {2}) == tuple((value,) for value in (2, two.ts, *two.facts))


def test_the_digest_of_facts_depends_on_every_fact_and_is_the_same_in_every_process() -> None:
    facts = [FACTS] + [FACTS._replace(**{name: None}) for name in FACTS._fields]
    facts += [FACTS._replace(alias="Store 4"), FACTS._replace(alias="", android_version="Store 42")]
    assert len({batch.facts_digest(one) for one in facts}) == len(facts)
    assert batch.facts_digest(FACTS) == DIGEST_OF_FACTS
    assert batch.facts_digest(DeviceFacts(None, None, None, None, None, None, None)) is None


# ---- newer content ------------------------------------------------------------------------------------------------


def live(seconds: float, clock_ahead_s: float = 0, *, booted: float = -1_000, **changes: object) -> Heartbeat:
    """Return a heartbeat received at once, `seconds` after noon, from a device whose clock is `clock_ahead_s` ahead."""
    received_at = NOON + timedelta(seconds=seconds)
    made = structs.replace(beat(ts=received_at + timedelta(seconds=clock_ahead_s)), received_at=received_at)
    return structs.replace(made, **({"uptime_s": round(seconds - booted)} | changes))


def queued(made: Heartbeat, seconds: float) -> Heartbeat:
    """Return the heartbeat as if it had been queued: received `seconds` after noon, whatever its ts."""
    return structs.replace(made, received_at=NOON + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("known", "new", "newer"),
    [
        (live(0), live(60), True),
        (live(0), live(60, -1_500), True),  # the device's clock was set back by 25 minutes
        (live(0, 240), live(60), True),  # the device's clock was set back to the right time
        (live(0), live(60, -1_500, uptime_s=None), False),  # without an uptime, ts decides
        (live(0, uptime_s=None), live(60, -1_500), False),
        (live(0), live(120, -1_500, booted=-1_060), True),  # the uptime may differ by a minute at most
        (live(0), live(120, -1_500, booted=-1_061), False),
        (live(0), live(120, -1_500, booted=-939), False),
        (live(0), queued(live(-600), 1), False),  # made earlier in the same boot
        (live(0), queued(live(-30), 1), False),  # made half a minute earlier: within the tolerance, but not newer
        (live(0, booted=-10), queued(live(-3_600, booted=-90_000), 1), False),  # made before the last boot
        (live(0), live(0), False),  # the same heartbeat
        (live(40 * 86_400, clock_wrong=True), live(60), True),  # received by a daemon whose clock was 40 days ahead
        (live(40 * 86_400), live(60), True),
        (
            live(0),
            live(-3 * 86_400, clock_wrong=True, uptime_s=1),
            False,
        ),  # received by a daemon whose clock is three days behind
        (live(0), queued(live(-4 * 86_400), -3 * 86_400), False),  # by the same daemon, after a day in the queue
        (
            live(0, clock_wrong=True),
            live(-3 * 86_400, clock_wrong=True, uptime_s=1),
            True,
        ),  # a clock that is never right
        (live(90_000), live(0, booted=0), False),  # the known heartbeat is 25 hours ahead
    ],
)
def test_newer_content_is_recognised(known: Heartbeat, new: Heartbeat, newer: bool) -> None:
    assert batch.is_newer(known, new) is newer


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(-400, 0), st.booleans(), st.booleans()), min_size=1))
def test_rounds_have_the_same_result_as_one_heartbeat_after_another(steps: list[tuple[int, int, bool, bool]]) -> None:
    """A field that a heartbeat omits keeps the value of the heartbeat before, however the heartbeats are batched."""
    arrived = [
        structs.replace(
            live(at, ahead),
            battery_pct=at % 101 if battery else None,
            label=LABEL._replace(sections=31 if battery else 30),
            facts=FACTS._replace(alias=f"Store {at}" if alias else None),
        )
        for at, ahead, battery, alias in sorted(steps)
    ]
    expected = apply([[h] for h in arrived])
    assert apply(batch.make_plan(arrived, RecentKeys(10)).rounds) == expected


def apply(rounds: list[list[Heartbeat]]) -> tuple[datetime, int | None, str | None]:
    """Return the fields that the test changes as upsert_last_status would store them."""
    known, battery, alias = rounds[0][0], rounds[0][0].battery_pct, rounds[0][0].facts.alias
    for [new] in rounds[1:]:
        if batch.is_newer(known, new):
            known = new
            battery = new.battery_pct if new.label.sections & BATTERY else battery
            alias = new.facts.alias or alias
    return known.ts, battery, alias
