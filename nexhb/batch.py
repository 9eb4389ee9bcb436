"""Heartbeats → the plan of one transaction. Pure.

The first heartbeat of a bucket is the row, later ones are duplicates; the newest of each device is its status,
also where its history row was a duplicate. Everything is sorted by key, so that two daemons lock in one order.
Whether a heartbeat is newer than what is known of its device is decided by `is_newer` here and by newer_content in
SQL, which are the same rule; a test holds them together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from nexhb.wire import ALL_SECTIONS, BUCKET_EPOCH, DeviceFacts, Heartbeat, Label, pack_moment

UPTIME_TOLERANCE_S = 60
MADE_JUST_NOW = timedelta(hours=1)
AHEAD_MOST = timedelta(hours=25)  # accept_future is a day at most; an hour more for clocks that differ

Key = int  # device_no and bucket in one integer: half the memory of a tuple, and its order is theirs

HISTORY_COLUMNS = (
    "ts", "received_at", "device_no", "bucket", "label_no", "uptime_s", "ram_used_mb", "temp_c", "battery_pct",
    "signal_dbm", "plugged", "unity_running", "clock_wrong", "ip",
)  # fmt: skip


def key_of(device_no: int, bucket: int) -> Key:
    """The key of a row of the history; sorts by device_no, then bucket."""
    return (device_no << 32) + bucket


class RecentKeys:
    """Keys written a short while ago, so that the database need not be asked. Bounded: two generations of
    `capacity` keys, the older one forgotten when the younger is full."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._young: set[Key] = set()
        self._old: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._young or key in self._old

    def none_of(self, keys: Set[Key]) -> bool:
        """Whether it holds none of these."""
        return self._young.isdisjoint(keys) and self._old.isdisjoint(keys)

    def add(self, keys: Iterable[Key]) -> None:
        """Remember keys that are committed (and no others: a lost batch must be able to come again)."""
        self._young.update(keys)
        if len(self._young) >= self._capacity:
            self._old, self._young = self._young, set()


class Plan(NamedTuple):
    """What one transaction does."""

    rows: dict[date, list[tuple[Key, int]]]  # day → (key, index of the heartbeat), sorted by key
    duplicates: set[int]  # indices that get no row
    rounds: list[list[Heartbeat]]  # statuses to write, one round after the other; a device once a round, sorted by it
    keys: Set[Key] = frozenset()  # those of the rows
    heard: Mapping[int, datetime] = {}  # device_no → its last receipt, of devices with several heartbeats


def make(heartbeats: Sequence[Heartbeat], recent: RecentKeys) -> Plan:
    """The plan for these heartbeats, in the order in which they arrived."""
    keys = [(h.device_no << 32) + h.bucket for h in heartbeats]
    taken = set(keys)
    if not keys or len(taken) < len(keys) or not recent.none_of(taken):
        return _make_of_some(heartbeats, keys, recent)
    # Nothing is there twice, as nearly always: half the time. The largest key of a device is its newest heartbeat.
    pairs = sorted(zip(keys, range(len(keys)), strict=True))
    days = _by_day(heartbeats, pairs)
    newest = {key >> 32: index for key, index in pairs}
    if len(newest) == len(heartbeats):
        return Plan(days, set(), [[heartbeats[index] for index in newest.values()]], taken)
    rounds, heard = _rounds(heartbeats)
    return Plan(days, set(), rounds, taken, heard)


def _make_of_some(heartbeats: Sequence[Heartbeat], keys: Sequence[Key], recent: RecentKeys) -> Plan:
    pairs: list[tuple[Key, int]] = []
    duplicates: set[int] = set()
    taken: set[Key] = set()
    for index, key in enumerate(keys):
        if key in taken or key in recent:
            duplicates.add(index)
        else:
            taken.add(key)
            pairs.append((key, index))
    pairs.sort()
    rounds, heard = _rounds(heartbeats)
    return Plan(_by_day(heartbeats, pairs), duplicates, rounds, taken, heard)


# ---- presence and content -----------------------------------------------------------------------------------------


def is_newer(known: Heartbeat, new: Heartbeat) -> bool:
    """Whether the content of `new`, which came after `known`, replaces that of `known`. sql/schema.sql,
    newer_content, says why."""
    if new.ts > known.ts:
        return True
    if new.uptime_s is not None and known.uptime_s is not None and new.uptime_s > known.uptime_s:
        passed_s = (new.received_at - known.received_at).total_seconds()
        if passed_s > 0 and abs(new.uptime_s - known.uptime_s - passed_s) <= UPTIME_TOLERANCE_S:
            return True
    if known.ts - new.received_at <= AHEAD_MOST:
        return False
    return known.clock_wrong if new.clock_wrong else new.received_at - new.ts <= MADE_JUST_NOW


def _rounds(heartbeats: Sequence[Heartbeat]) -> tuple[list[list[Heartbeat]], dict[int, datetime]]:
    """Statuses to write, in rounds, and the last receipt of each device with several heartbeats.

    A heartbeat that is newer than the one before it and states the same fields takes its place, so that a queue of one
    agent is one round. Any other is written after it, since what a heartbeat leaves out stays as it was known, and
    whether it is newer than what is known only the database can say.
    """
    steps: dict[int, list[Heartbeat]] = {}
    heard: dict[int, datetime] = {}
    for heartbeat in heartbeats:
        own = steps.setdefault(heartbeat.device_no, [])
        if not own:
            own.append(heartbeat)
            continue
        last = own[-1]
        heard[heartbeat.device_no] = max(heard.get(heartbeat.device_no, last.received_at), heartbeat.received_at)
        if not _states_the_same(last, heartbeat):
            own.append(heartbeat)
        elif is_newer(last, heartbeat) or (heartbeat.ts == last.ts and heartbeat.clock_wrong and last.clock_wrong):
            own[-1] = heartbeat  # a queue whose times are those of its receipt: the last of it is the newest
        elif heartbeat.ts != last.ts or heartbeat.uptime_s != last.uptime_s:
            own.append(heartbeat)
    most = max(map(len, steps.values()), default=0)
    numbers = sorted(steps)
    return [[steps[no][nth] for no in numbers if nth < len(steps[no])] for nth in range(most)], heard


def _states_the_same(one: Heartbeat, other: Heartbeat) -> bool:
    if one.label is other.label and one.facts is other.facts and one.label.sections == ALL_SECTIONS:
        return True  # as nearly always: equal ones are the same objects
    return _stated(one) == _stated(other)


def _stated(h: Heartbeat) -> tuple[object, ...]:
    """Which fields a heartbeat states, besides those of its sections."""
    facts = [fact is None for fact in h.facts]
    return h.label.sections, not h.label.agent_version, h.unity_running is None, h.signal_dbm is None, *facts


@lru_cache(maxsize=16_384)
def facts_digest(facts: DeviceFacts) -> int | None:
    """A number that changes with what a device says of itself, the same in every daemon; None where it says nothing.
    32 bits: of two different facts of one device one pair in four billion is taken for the same."""
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
    return {_date(day): found for day, found in rows.items()}


def day_of(heartbeat: Heartbeat) -> date:
    """The day that `ts` lies in: its bucket's, for a bucket divides a day."""
    return _date(heartbeat.bucket // 86_400)


@lru_cache(maxsize=512)
def _date(day: int) -> date:
    return datetime.fromtimestamp(BUCKET_EPOCH + day * 86_400, UTC).date()


def history_row(h: Heartbeat, label_no: int) -> tuple[Any, ...]:
    """The row of device_heartbeats, in the order of HISTORY_COLUMNS; its moments as `db.use_packed` takes them."""
    return (
        pack_moment(h.ts), pack_moment(h.received_at), h.device_no, h.bucket, label_no, h.uptime_s, h.ram_used_mb,
        h.temp_c, h.battery_pct, h.signal_dbm, h.plugged, h.unity_running, h.clock_wrong, h.ip,
    )  # fmt: skip


_NOTHING_MEASURED = dict.fromkeys(
    ("battery_pct", "plugged", "temp_c", "ip", "signal_dbm", "uptime_s", "ram_used_mb", "unity_running")
)


def bare(h: Heartbeat) -> Heartbeat:
    """The same arrival without anything that its device measured or said."""
    label, facts = Label("", "", "", "", 0), type(h.facts)(*[None] * len(h.facts))
    return msgspec.structs.replace(h, label=label, facts=facts, **_NOTHING_MEASURED)


def status_columns(
    statuses: Sequence[Heartbeat], heard: Mapping[int, datetime] | None = None
) -> tuple[Sequence[Any], ...]:
    """The arguments of upsert_last_status: one sequence a column; moments as in history_row. `heard`: as in Plan."""
    heard = heard or {}
    rows = [
        (
            h.device_no, h.device_id, pack_moment(h.ts), received, h.battery_pct, h.plugged, h.temp_c,
            network_type or None, ssid or None, h.ip, h.signal_dbm, h.uptime_s, h.ram_used_mb, unity_version or None,
            h.unity_running, agent_version or None, h.clock_wrong,
            pack_moment(heard[h.device_no]) if h.device_no in heard else received, sections, facts_digest(h.facts),
        )
        for h in statuses
        for received in (pack_moment(h.received_at),)
        for agent_version, unity_version, network_type, ssid, sections in (h.label,)
    ]  # fmt: skip
    return tuple(zip(*rows, strict=True))


def ledger_columns(heartbeats: Sequence[Heartbeat], plan: Plan, written: Set[Key]) -> tuple[Sequence[Any], ...]:
    """What is committed of each day: day[], written[], deduplicated[]. `written`: the keys that became rows."""
    received = {day: len(rows) for day, rows in plan.rows.items()}
    if len(written) == sum(received.values()):  # all that could be, as nearly always
        became_rows = dict(received)
    else:
        became_rows = {day: sum(key in written for key, _ in rows) for day, rows in plan.rows.items()}
    for index in plan.duplicates:
        day = day_of(heartbeats[index])
        received[day] = received.get(day, 0) + 1
    days = sorted(received)
    rows = [became_rows.get(day, 0) for day in days]
    return days, rows, [received[day] - count for day, count in zip(days, rows, strict=True)]


def ledger_correction(plan: Plan, written: Set[Key]) -> tuple[Sequence[Any], ...]:
    """What to add to ledger_columns that took every row of the plan for new: day[], written[], deduplicated[]."""
    days = list(plan.rows)
    known = [sum(key not in written for key, _ in plan.rows[day]) for day in days]
    return days, [-count for count in known], known


def facts_columns(statuses: Sequence[Heartbeat], wanted: Set[int]) -> tuple[Sequence[Any], ...]:
    """The arguments of update_facts, for the devices whose numbers are `wanted`: one sequence a column."""
    return tuple(zip(*((h.device_no, h.ts, *h.facts) for h in statuses if h.device_no in wanted), strict=True))


def unknown_labels(labels: Iterable[Label], known: Mapping[Label, int]) -> list[Label]:
    """Labels that have no number yet, sorted."""
    return sorted(set(labels).difference(known))
