"""Both sides of a day, each counted by its own database."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from nexhb import sql
from nexhb.legacy.history import Day, History
from nexhb.legacy.source import Counts
from nexhb.wire import BUCKET_EPOCH

_Q = sql.queries("legacy")

DEVICES_AT_ONCE = 100


async def compare(history: History, day: Day) -> tuple[Counts, int]:
    """What the source counts of a day, and how many of its different device and bucket have no row here."""
    numbers = history.devices.numbers
    counts = await history.source.day(day.start, day.end, history.bucket_s, list(numbers))
    here = await history.conn.fetchval(_Q["present"], day.start, day.start + timedelta(days=1), list(numbers.values()))
    if here == day.written == counts.keys:
        return counts, 0  # each of them was written by an import, and nothing else is there
    return counts, await _missing(history, day)


async def _missing(history: History, day: Day) -> int:
    """The keys themselves, one side held against the other: here are rows that no import wrote."""
    numbers, missing = history.devices.numbers, 0
    ids = list(numbers)
    for place in range(0, len(ids), DEVICES_AT_ONCE):
        some = ids[place : place + DEVICES_AT_ONCE]
        keys = await history.source.keys(day.start, day.end, history.bucket_s, some)
        if keys:
            missing += await history.conn.fetchval(
                _Q["missing"], day.start, day.start + timedelta(days=1),
                [numbers[key["device_id"]] for key in keys], [key["bucket"] - BUCKET_EPOCH for key in keys],
            )  # fmt: skip
            await asyncio.sleep(history.pace.wait_s(len(keys)))
    return missing
