"""Plan one transaction from a batch of heartbeats. Pure.

The first heartbeat of a bucket becomes a row of the history, and later ones are duplicates. The newest heartbeat of
each device becomes its last status, even if its row is a duplicate. Everything is sorted by key, so that two daemons
take their locks in the same order. `is_newer` here and newer_content in SQL are the same rule for whether a heartbeat
is newer than the known status of its device; a test keeps them equal.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from nexhb.heartbeat import ALL_SECTIONS, BUCKET_EPOCH, CONTENT, MEASURED, DeviceFacts, Heartbeat, Key, Label
from nexhb.postgres.codecs import pack_moment

UPTIME_TOLERANCE_S = 60
FRESH_FOR = timedelta(hours=1)
MAX_AHEAD = timedelta(hours=25)  # accept_future is at most a day; one more hour allows for clocks that differ


class RecentKeys:
    """Keys that were committed recently, so that duplicates are recognised without the database.

    The memory is limited to two generations of `capacity` keys: when the younger generation is full, the older one is
    dropped.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._young: set[Key] = set()
        self._old: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._young or key in self._old

    def isdisjoint(self, keys: Set[Key]) -> bool:
        """Return whether none of these keys is remembered."""
        return self._young.isdisjoint(keys) and self._old.isdisjoint(keys)

    def add(self, keys: Iterable[Key]) -> None:
        """Remember committed keys, and no others: devices must be able to send a lost batch again."""
        self._young.update(keys)
        if len(self._young) >= self._capacity:
            self._old, self._young = self._young, set()


class Plan(NamedTuple):
    """The work of one transaction."""

    rows: dict[date, list[tuple[Key, int]]]  # day → (key, index of the heartbeat), sorted by key
    duplicates: set[int]  # indices of the heartbeats that become no row
    # Statuses to write, one round after another. A round has each device at most once and is sorted by device.
    rounds: list[list[Heartbeat]]
    keys: Set[Key] = frozenset()  # the keys of the rows
    last_received: Mapping[int, datetime] = {}  # device_no → last receipt, for devices with several heartbeats


def make_plan(heartbeats: Sequence[Heartbeat], recent: RecentKeys) -> Plan:
    """Return the plan for heartbeats in order of arrival."""
    keys = [(h.device_no << 32) + h.bucket for h in heartbeats]
    distinct = set(keys)
    if not keys or len(distinct) < len(keys) or not recent.isdisjoint(distinct):
        return _make_plan_with_duplicates(heartbeats, keys, recent)
    # Plan the usual batch, which has no duplicates, in half the time. A device's largest key is that of its newest
    # heartbeat.
    pairs = sorted(zip(keys, range(len(keys)), strict=True))
    days = _by_day(heartbeats, pairs)
    newest = {key >> 32: index for key, index in pairs}
    if len(newest) == len(heartbeats):
        return Plan(days, set(), [[heartbeats[index] for index in newest.values()]], distinct)
    rounds, last_received = _rounds(heartbeats)
    return Plan(days, set(), rounds, distinct, last_received)


def _make_plan_with_duplicates(heartbeats: Sequence[Heartbeat], keys: Sequence[Key], recent: RecentKeys) -> Plan:
    pairs: list[tuple[Key, int]] = []
    duplicates: set[int] = set()
    new_keys: set[Key] = set()
    for index, key in enumerate(keys):
        if key in new_keys or key in recent:
            duplicates.add(index)
        else:
            new_keys.add(key)
            pairs.append((key, index))
    pairs.sort()
    rounds, last_received = _rounds(heartbeats)
    return Plan(_by_day(heartbeats, pairs), duplicates, rounds, new_keys, last_received)


# ---- presence and content -----------------------------------------------------------------------------------------


def is_newer(known: Heartbeat, new: Heartbeat) -> bool:
    """Return whether the content of `new`, received after `known`, replaces the content of `known`. For the reasons see
    newer_content in sql/schema.sql."""
    if new.ts > known.ts:
        return True
    if new.uptime_s is not None and known.uptime_s is not None and new.uptime_s > known.uptime_s:
        passed_s = (new.received_at - known.received_at).total_seconds()
        if passed_s > 0 and abs(new.uptime_s - known.uptime_s - passed_s) <= UPTIME_TOLERANCE_S:
            return True
    if known.ts - new.received_at <= MAX_AHEAD:
        return False
    return known.clock_wrong if new.clock_wrong else new.received_at - new.ts <= FRESH_FOR


def _rounds(heartbeats: Sequence[Heartbeat]) -> tuple[list[list[Heartbeat]], dict[int, datetime]]:
    """Return the statuses to write, in rounds, and the last time of receipt of each device with several heartbeats.

    A heartbeat that is newer than its predecessor and states the same fields replaces it, so that the queue of one
    device needs one round. Any other heartbeat is written in a later round: a field that it omits keeps its stored
    value, and only the database knows whether it is newer than the stored status.
    """
    steps: dict[int, list[Heartbeat]] = {}
    last_received: dict[int, datetime] = {}
    for heartbeat in heartbeats:
        own = steps.setdefault(heartbeat.device_no, [])
        if not own:
            own.append(heartbeat)
            continue
        last = own[-1]
        latest = last_received.get(heartbeat.device_no, last.received_at)
        last_received[heartbeat.device_no] = max(latest, heartbeat.received_at)
        if not _states_same_fields(last, heartbeat):
            own.append(heartbeat)
        elif is_newer(last, heartbeat) or (heartbeat.ts == last.ts and heartbeat.clock_wrong and last.clock_wrong):
            own[-1] = heartbeat  # equal ts (a queue stamped with its receipt): the last heartbeat is the newest
        elif heartbeat.ts != last.ts or heartbeat.uptime_s != last.uptime_s:
            own.append(heartbeat)
    count = max(map(len, steps.values()), default=0)
    numbers = sorted(steps)
    return [[steps[no][nth] for no in numbers if nth < len(steps[no])] for nth in range(count)], last_received


def _states_same_fields(first: Heartbeat, second: Heartbeat) -> bool:
    if first.label is second.label and first.facts is second.facts and first.label.sections == ALL_SECTIONS:
        return True  # the usual case: equal labels and facts are the same objects, because they are cached
    return _stated_fields(first) == _stated_fields(second)


def _stated_fields(h: Heartbeat) -> tuple[object, ...]:
    """Return a value that is equal for heartbeats which state the same fields: the same sections, and the same fields
    among those that can be stated outside of their section."""
    facts = [fact is None for fact in h.facts]
    return h.label.sections, not h.label.agent_version, h.unity_running is None, h.signal_dbm is None, *facts


@lru_cache(maxsize=16_384)
def facts_digest(facts: DeviceFacts) -> int | None:
    """Return a digest of the facts that is the same in every daemon, or None if no fact is stated. With 32 bits, one
    pair of different facts in four billion has the same digest."""
    if not any(fact is not None for fact in facts):
        return None
    return zlib.crc32("\x1f".join(map(str, facts)).encode()) - 2**31


def _by_day(heartbeats: Sequence[Heartbeat], pairs: list[tuple[Key, int]]) -> dict[date, list[tuple[Key, int]]]:
    days = {heartbeats[index].bucket // 86_400 for _, index in pairs}
    if len(days) == 1:
        return {_date(days.pop()): pairs}
    rows: dict[int, list[tuple[Key, int]]] = {day: [] for day in sorted(days)}
    for pair in pairs:
        rows[heartbeats[pair[1]].bucket // 86_400].append(pair)
    return {_date(day): pairs_of_day for day, pairs_of_day in rows.items()}


def day_of(heartbeat: Heartbeat) -> date:
    """Return the UTC day of `ts`. It is the day of its bucket, because buckets do not cross midnight."""
    return _date(heartbeat.bucket // 86_400)


@lru_cache(maxsize=512)
def _date(day: int) -> date:
    return datetime.fromtimestamp(BUCKET_EPOCH + day * 86_400, UTC).date()


_NOTHING_MEASURED: dict[str, Any] = dict.fromkeys(column.name for column in MEASURED)


def without_content(h: Heartbeat) -> Heartbeat:
    """Return the heartbeat without any value that its device measured or stated."""
    label, facts = Label("", "", "", "", 0), type(h.facts)(*[None] * len(h.facts))
    return msgspec.structs.replace(h, label=label, facts=facts, **_NOTHING_MEASURED)


_CONTENT = [(column.name, attrgetter(column.name)) for column in CONTENT]


class Noteworthy(NamedTuple):
    """Which changes of a status are noted for the watcher."""

    battery_pct: int = 20  # a change of the charge, at this charge or less
    silence: timedelta = timedelta(seconds=600)  # a heartbeat after a longer silence


def status_columns(
    statuses: Sequence[Heartbeat],
    last_received: Mapping[int, datetime] | None = None,
) -> tuple[Sequence[Any], ...]:
    """Return the arguments of upsert_last_status that describe the statuses: one sequence per column, with packed
    times. `last_received`: as in `Plan`."""
    of_labels = dict(zip(Label._fields, zip(*[h.label for h in statuses], strict=True), strict=True))
    received = heard = [pack_moment(h.received_at) for h in statuses]
    if last_received:
        heard = [pack_moment(last_received.get(h.device_no, h.received_at)) for h in statuses]
    return (
        [h.device_no for h in statuses],
        [h.device_id for h in statuses],
        [pack_moment(h.ts) for h in statuses],
        received,
        [h.clock_wrong for h in statuses],
        heard,
        of_labels["sections"],
        [facts_digest(h.facts) for h in statuses],
        *(
            [text or None for text in of_labels[name]] if name in of_labels else [*map(value, statuses)]
            for name, value in _CONTENT
        ),
    )


def facts_columns(statuses: Sequence[Heartbeat], device_numbers: Set[int]) -> tuple[Sequence[Any], ...]:
    """Return the arguments of update_facts for these devices, one sequence per column."""
    return tuple(zip(*((h.device_no, h.ts, *h.facts) for h in statuses if h.device_no in device_numbers), strict=True))
