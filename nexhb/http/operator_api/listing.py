"""Respond with a page of a list as JSON, or with all its pages as CSV."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from nexhb.errors import NexhbError
from nexhb.http.transport import query
from nexhb.http.transport.csv_response import Row, stream_csv
from nexhb.http.transport.problem import Problem, json_response

# Limits of CSV. Each response holds one page in memory, and a connection of the database only while a page is read.
# With a million rows of 250 bytes, MAX_S requires a client that reads 140 kB/s.
MAX_AT_ONCE = 4  # per daemon
MAX_ROWS = 1_000_000
MAX_S = 1800.0
CSV_PAGE = 10_000  # rows read at once: each page of a list without an index costs a scan
CSV_SLICE = 100  # rows written at once: 5 ms (19 columns, busy cores), in which no heartbeat is handled
MAX_AFTER_CHARS = 150

RUNNING: web.AppKey[Counter[str]] = web.AppKey("csv lists", Counter)


class ListTooLong(NexhbError):
    sentence = "The list is too long for one response."


@dataclass(frozen=True)
class Page:
    """A page of a list. `following` is the `after` of the next page, None on the last one; `about` are the other fields
    of the JSON response."""

    rows: Sequence[Any]  # mappings, or objects of msgspec
    following: str | None
    about: Mapping[str, Any] = field(default_factory=dict)


Fetch = Callable[[str, int], Awaitable[Page]]  # after, limit → page


@dataclass(frozen=True)
class Listing:
    """A list: the field of its rows in JSON, the default and the maximum of `limit`, and the columns of CSV."""

    name: str
    columns: tuple[str, ...]
    default_limit: int
    max_limit: int


async def respond(request: web.Request, listing: Listing, fetch: Fetch) -> web.StreamResponse:
    """Respond with a page, or with format=csv with the rows after `after`: at most `limit`, or all without a limit."""
    limit = query.number(request, "limit", 0, 1, listing.max_limit)
    after = query.text(request, "after", max_length=MAX_AFTER_CHARS)
    if not is_csv(request):
        page = await fetch(after, limit or listing.default_limit)
        return json_response({**page.about, listing.name: page.rows, "next": page.following})
    running = request.app[RUNNING]
    if running.total() >= MAX_AT_ONCE:
        raise Problem(429, f"This daemon sends {MAX_AT_ONCE} lists as CSV already.", headers={"Retry-After": "60"})
    running["csv"] += 1
    try:
        pages = _pages(fetch, after, limit)
        return await stream_csv(request, listing.columns, pages, f"{listing.name}.csv")
    finally:
        running["csv"] -= 1


def is_csv(request: web.Request) -> bool:
    """Return whether CSV is asked for. Raise a 400 Problem."""
    return query.choice(request, "format", ("json", "csv")) == "csv"


async def _pages(fetch: Fetch, after: str, limit: int) -> AsyncIterator[Sequence[Row]]:
    """Yield the pages, in slices, of a list with at most `limit` rows (0: all). Raise ListTooLong if the list has more
    than MAX_ROWS rows, or the client needs longer than MAX_S to read it."""
    rows, started, following = 0, time.monotonic(), after
    while True:
        page = await fetch(following, min(CSV_PAGE, limit - rows) if limit else CSV_PAGE)
        for start in range(0, len(page.rows), CSV_SLICE):
            rows_now = page.rows[start : start + CSV_SLICE]
            yield [row if isinstance(row, Mapping) else msgspec.structs.asdict(row) for row in rows_now]
        rows += len(page.rows)
        if page.following is None or page.following == following or (limit and rows >= limit):
            return
        if rows >= MAX_ROWS:
            raise ListTooLong(f"It has more than {MAX_ROWS:,} rows.")
        if time.monotonic() - started > MAX_S:
            raise ListTooLong(f"The client has not read it within {MAX_S:g} s.")
        following = page.following
