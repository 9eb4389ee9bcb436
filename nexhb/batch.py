"""Heartbeats → the plan of one transaction. Pure.

The first heartbeat of a bucket is the row, later ones are duplicates; the newest of each device is its status,
also where its history row was a duplicate. Everything is sorted by key, so that two daemons lock in one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from nexhb.wire import BUCKET_EPOCH, Heartbeat, Label, pack_moment

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
    newest: list[Heartbeat]  # one per device, sorted by device_no
    keys: Set[Key] = frozenset()  # those of the rows


def make(heartbeats: Sequence[Heartbeat], recent: RecentKeys) -> Plan:
    """The plan for these heartbeats, in the order in which they arrived."""
    keys = [(h.device_no << 32) + h.bucket for h in heartbeats]
    taken = set(keys)
    if len(taken) < len(keys) or not recent.none_of(taken):
        return _make_of_some(heartbeats, keys, recent)
    # Nothing is there twice, as nearly always: half the time. The largest key of a device is its newest heartbeat.
    pairs = sorted(zip(keys, range(len(keys)), strict=True))
    newest = {key >> 32: index for key, index in pairs}
    return Plan(_by_day(heartbeats, pairs), set(), [heartbeats[index] for index in newest.values()], taken)


def _make_of_some(heartbeats: Sequence[Heartbeat], keys: Sequence[Key], recent: RecentKeys) -> Plan:
    pairs: list[tuple[Key, int]] = []
    duplicates: set[int] = set()
    newest: dict[int, Heartbeat] = {}
    taken: set[Key] = set()
    for index, (key, heartbeat) in enumerate(zip(keys, heartbeats, strict=True)):
        if key in taken or key in recent:
            duplicates.add(index)
        else:
            taken.add(key)
            pairs.append((key, index))
        known = newest.get(heartbeat.device_no)
        if known is None or heartbeat.ts >= known.ts:  # of those with a wrong clock, received together, the last
            newest[heartbeat.device_no] = heartbeat
    pairs.sort()
    return Plan(_by_day(heartbeats, pairs), duplicates, [newest[number] for number in sorted(newest)], taken)


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
    label, facts = Label("", "", "", ""), type(h.facts)(*[None] * len(h.facts))
    return msgspec.structs.replace(h, label=label, facts=facts, **_NOTHING_MEASURED)


def status_columns(newest: Sequence[Heartbeat]) -> tuple[Sequence[Any], ...]:
    """The arguments of upsert_last_status: one sequence a column; moments as in history_row."""
    rows = [
        (
            h.device_no, h.device_id, pack_moment(h.ts), pack_moment(h.received_at), h.battery_pct, h.plugged, h.temp_c,
            network_type or None, ssid or None, h.ip, h.signal_dbm, h.uptime_s, h.ram_used_mb, unity_version or None,
            h.unity_running, agent_version or None, h.clock_wrong,
        )
        for h in newest
        for agent_version, unity_version, network_type, ssid in (h.label,)
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


def changed_facts(newest: Sequence[Heartbeat], known: Mapping[int, int]) -> list[Heartbeat]:
    """Heartbeats whose device says something of itself that is not known yet. `known`: device_no → hash of what it
    said last (a hash, because a million devices' texts would take half a gigabyte)."""
    return [h for h in newest if known.get(h.device_no) != hash(h.facts)]


def unknown_labels(labels: Iterable[Label], known: Mapping[Label, int]) -> list[Label]:
    """Labels that have no number yet, sorted."""
    return sorted(set(labels).difference(known))
