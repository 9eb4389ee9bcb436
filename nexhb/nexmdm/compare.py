"""Compare a day in NexMDM's database (the source) and in nexhb's. Each database counts its own rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from nexhb.heartbeat import BUCKET_EPOCH
from nexhb.nexmdm.history import HistoryImport, ImportedDay
from nexhb.nexmdm.source import DayCounts
from nexhb.postgres import sql

_Q = sql.queries("nexmdm_import")

DEVICES_PER_QUERY = 100


@dataclass(frozen=True)
class KeyCounts:
    """Counts of the keys of the source's rows of a day. A key is a pair of device and bucket."""

    missing: int  # keys that have no row in nexhb, and are not copies (see ImportedDay.copies)
    imported: int  # keys whose row in nexhb was written by an import


async def compare(history: HistoryImport, day: ImportedDay) -> tuple[DayCounts, KeyCounts]:
    """Return the source's counts of a day, and which of its keys nexhb has."""
    numbers = history.devices.numbers
    counts = await history.source.day(day.start, day.end, history.bucket_s, list(numbers))
    here = await history.conn.fetchval(_Q["present"], day.start, day.start + timedelta(days=1), list(numbers.values()))
    if here == day.written == counts.keys:
        return counts, KeyCounts(0, counts.keys)  # an import wrote every row of the day
    keys = await _compare_keys(history, day)
    if keys.missing and keys.missing != day.copies:  # if equal, the missing keys are known to be copies
        day.copies = (await _count_keys(history, day, list(day.copied))).missing
    return counts, KeyCounts(keys.missing - day.copies if keys.missing else 0, keys.imported)


async def _compare_keys(history: HistoryImport, day: ImportedDay) -> KeyCounts:
    """Compare key by key, because nexhb has rows of the day that no import wrote."""
    numbers, missing, imported = history.devices.numbers, 0, 0
    ids = list(numbers)
    for start in range(0, len(ids), DEVICES_PER_QUERY):
        chunk = ids[start : start + DEVICES_PER_QUERY]
        rows = await history.source.keys(day.start, day.end, history.bucket_s, chunk)
        if rows:
            keys = [(numbers[row["device_id"]], row["bucket"] - BUCKET_EPOCH) for row in rows]
            counts = await _count_keys(history, day, keys)
            missing, imported = missing + counts.missing, imported + counts.imported
            await asyncio.sleep(history.pace.wait_s(len(rows)))
    return KeyCounts(missing, imported)


async def _count_keys(history: HistoryImport, day: ImportedDay, keys: Sequence[tuple[int, int]]) -> KeyCounts:
    row = await history.conn.fetchrow(
        _Q["missing"], day.start, day.start + timedelta(days=1), [key[0] for key in keys], [key[1] for key in keys]
    )
    assert row is not None  # noqa: S101 - an aggregate has one row
    return KeyCounts(*row)
