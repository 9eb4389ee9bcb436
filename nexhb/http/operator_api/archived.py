"""Read a device's heartbeats of archived days, without restoring the days."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from aiohttp import web

from nexhb.archive import catalog, get
from nexhb.archive.catalog import Archived
from nexhb.archive.opening import open_store
from nexhb.errors import ArchiveDamaged, StoreError
from nexhb.heartbeat import BUCKET_START, CONTENT
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.transport.problem import Problem
from nexhb.http.transport.query import invalid
from nexhb.reading.reads import Row

# Limits of a request: reading a day reads and verifies its whole archive.
MAX_DAYS = 7
MAX_S = 60.0
MAX_AT_ONCE = 2  # per daemon
MAX_DAYS_NAMED = 1_000

_RETRY = {"Retry-After": "60"}

READING: web.AppKey[asyncio.Semaphore] = web.AppKey("archive reads", asyncio.Semaphore)

_FROM_TEXT: Mapping[str, Callable[[str], Any]] = {
    "integer": int, "smallint": int, "real": float, "boolean": lambda text: text == "t", "text": str, "inet": str,
}  # fmt: skip


async def between(api: OperatorApi, start: datetime, end: datetime) -> list[Archived]:
    """Return the archives of the days of start ≤ t < end that are not in the database, oldest first."""
    async with api.reads.acquired("archived days") as conn:
        return await catalog.between(conn, start, end, MAX_DAYS_NAMED)


def days_of(archives: Sequence[Archived]) -> list[date]:
    """Return the days of these archives."""
    return sorted({archived.start.astimezone(UTC).date() for archived in archives})


class Wanted(NamedTuple):
    """The first `limit` heartbeats of a device with start ≤ ts < end, newest first."""

    device_id: str
    start: datetime
    end: datetime
    limit: int


async def add_heartbeats(
    request: web.Request, wanted: Wanted, archives: Sequence[Archived], found: Sequence[tuple[int, Row]]
) -> list[tuple[int, Row]]:
    """Return the heartbeats, each with its bucket: those that were `found` in the database, and those of the archives.
    Archives are read day by day, newest first, as far as needed, and each is verified. Raise a 400, 429 or 503
    Problem."""
    days = days_of(archives)
    if len(days) > MAX_DAYS:
        raise invalid("from", f"{len(days)} days from then on are archived; a request reads at most {MAX_DAYS}")
    reading = request.app[READING]
    if reading.locked():
        raise Problem(429, f"This daemon reads {MAX_AT_ONCE} histories from the archive already.", headers=_RETRY)
    async with reading:
        try:
            async with asyncio.timeout(MAX_S):
                return await _with_archived(request.app[OPERATOR_API], wanted, archives, found)
        except TimeoutError:
            detail = f"Reading the archive took more than {MAX_S:g} s. A shorter time has fewer days."
            raise Problem(503, detail, headers=_RETRY) from None
        except (StoreError, ArchiveDamaged) as error:
            raise Problem(503, str(error), headers=_RETRY) from error


async def _with_archived(
    api: OperatorApi, wanted: Wanted, archives: Sequence[Archived], found: Sequence[tuple[int, Row]]
) -> list[tuple[int, Row]]:
    rows, limit = list(found), wanted.limit
    async with open_store(api.settings.archive_url, api.settings.archive) as store:
        newest_first = sorted(archives, key=lambda archived: archived.start, reverse=True)
        for _, of_day in groupby(newest_first, key=lambda archived: archived.start):
            day = list(of_day)
            if len(rows) >= limit and rows[limit - 1][0] >= (day[0].end - BUCKET_START) // timedelta(seconds=1):
                break  # the rest is older
            texts = await get.heartbeats_of(store, day, wanted.device_id, api.settings.data_dir / "spool")
            rows += [(int(text["bucket"] or 0), _row(text)) for text in texts]
            rows = [each for each in rows if wanted.start <= each[1]["ts"] < wanted.end]
            rows.sort(key=lambda each: each[0], reverse=True)
    return rows[:limit]


def _row(texts: Mapping[str, str | None]) -> Row:
    """Return the heartbeat of an archive as the history returns it."""
    row: Row = {name: datetime.fromisoformat(texts[name] or "") for name in ("ts", "received_at")}
    row["clock_wrong"] = texts["clock_wrong"] == "t"
    for column in CONTENT:
        text = texts.get(column.name)
        row[column.name] = None if text is None else _FROM_TEXT[column.type](text)
    return row
