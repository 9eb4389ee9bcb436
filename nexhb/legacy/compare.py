"""Both sides of a day, each counted by its own database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from nexhb import sql
from nexhb.legacy.history import Day, History
from nexhb.legacy.source import Counts
from nexhb.wire import BUCKET_EPOCH

_Q = sql.queries("legacy")

DEVICES_AT_ONCE = 100


@dataclass(frozen=True)
class Keys:
    """Of the source's different device and bucket of a day."""

    missing: int  # have no row here, and are no copies
    imported: int  # have a row that an import wrote


async def compare(history: History, day: Day) -> tuple[Counts, Keys]:
    """What the source counts of a day, and what became of its different device and bucket."""
    numbers = history.devices.numbers
    counts = await history.source.day(day.start, day.end, history.bucket_s, list(numbers))
    here = await history.conn.fetchval(_Q["present"], day.start, day.start + timedelta(days=1), list(numbers.values()))
    if here == day.written == counts.keys:
        return counts, Keys(0, counts.keys)  # each of them was written by an import, and nothing else is there
    found = await _found(history, day)
    if found.missing and found.missing != day.copies:  # these are all copies where they were found before
        day.copies = (await _look_up(history, day, list(day.copied))).missing
    return counts, Keys(found.missing - day.copies if found.missing else 0, found.imported)


async def _found(history: History, day: Day) -> Keys:
    """The keys themselves, one side held against the other: here are rows that no import wrote."""
    numbers, missing, imported = history.devices.numbers, 0, 0
    ids = list(numbers)
    for place in range(0, len(ids), DEVICES_AT_ONCE):
        some = ids[place : place + DEVICES_AT_ONCE]
        keys = await history.source.keys(day.start, day.end, history.bucket_s, some)
        if keys:
            wanted = [(numbers[key["device_id"]], key["bucket"] - BUCKET_EPOCH) for key in keys]
            found = await _look_up(history, day, wanted)
            missing, imported = missing + found.missing, imported + found.imported
            await asyncio.sleep(history.pace.wait_s(len(keys)))
    return Keys(missing, imported)


async def _look_up(history: History, day: Day, keys: Sequence[tuple[int, int]]) -> Keys:
    row = await history.conn.fetchrow(
        _Q["missing"], day.start, day.start + timedelta(days=1), [key[0] for key in keys], [key[1] for key in keys]
    )
    assert row is not None  # noqa: S101 - an aggregate has one row
    return Keys(*row)
