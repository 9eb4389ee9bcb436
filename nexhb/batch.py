"""Heartbeats → the plan of one transaction. Pure.

The first heartbeat of a bucket is the row, later ones are duplicates; the newest of each device is its status,
also where its history row was a duplicate. Everything is sorted by key, so that two daemons lock in one order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from nexhb.wire import Heartbeat, Label

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


def make(heartbeats: Sequence[Heartbeat], recent: RecentKeys) -> Plan:
    """The plan for these heartbeats, in the order in which they arrived."""
    rows: dict[date, list[tuple[Key, int]]] = {}
    duplicates: set[int] = set()
    newest: dict[int, Heartbeat] = {}
    taken: set[Key] = set()
    for index, heartbeat in enumerate(heartbeats):
        number = heartbeat.device_no
        key = (number << 32) + heartbeat.bucket
        if key in taken or key in recent:
            duplicates.add(index)
        else:
            taken.add(key)
            rows.setdefault(heartbeat.ts.date(), []).append((key, index))
        known = newest.get(number)
        if known is None or heartbeat.ts >= known.ts:  # of those with a wrong clock, received together, the last
            newest[number] = heartbeat
    for day in rows.values():
        day.sort()
    return Plan(rows, duplicates, [newest[number] for number in sorted(newest)])


def history_row(h: Heartbeat, label_no: int) -> tuple[Any, ...]:
    """The row of device_heartbeats, in the order of HISTORY_COLUMNS."""
    return (
        h.ts, h.received_at, h.device_no, h.bucket, label_no, h.uptime_s, h.ram_used_mb, h.temp_c, h.battery_pct,
        h.signal_dbm, h.plugged, h.unity_running, h.clock_wrong, h.ip,
    )  # fmt: skip


def status_columns(newest: Sequence[Heartbeat]) -> tuple[Sequence[Any], ...]:
    """The arguments of upsert_last_status: one sequence a column."""
    return tuple(
        zip(
            *(
                (
                    h.device_no, h.device_id, h.ts, h.received_at, h.battery_pct, h.plugged, h.temp_c,
                    h.label.network_type or None, h.label.ssid or None, h.ip, h.signal_dbm, h.uptime_s,
                    h.ram_used_mb, h.label.unity_pkg_version or None, h.unity_running,
                    h.label.agent_version or None, h.clock_wrong,
                )
                for h in newest
            ),
            strict=True,
        )
    )  # fmt: skip


def ledger_columns(heartbeats: Sequence[Heartbeat], plan: Plan, written: set[Key]) -> tuple[Sequence[Any], ...]:
    """What is committed of each day: day[], written[], deduplicated[]. `written`: the keys that became rows."""
    received = Counter(h.ts.date() for h in heartbeats)
    days = sorted(received)
    rows = [sum(key in written for key, _ in plan.rows.get(day, ())) for day in days]
    return days, rows, [received[day] - count for day, count in zip(days, rows, strict=True)]


def changed_facts(newest: Sequence[Heartbeat], known: Mapping[int, int]) -> list[Heartbeat]:
    """Heartbeats whose device says something of itself that is not known yet. `known`: device_no → hash of what it
    said last (a hash, because a million devices' texts would take half a gigabyte)."""
    return [h for h in newest if known.get(h.device_no) != hash(h.facts)]


def unknown_labels(labels: Iterable[Label], known: Mapping[Label, int]) -> list[Label]:
    """Labels that have no number yet, sorted."""
    return sorted({label for label in labels if label not in known})
