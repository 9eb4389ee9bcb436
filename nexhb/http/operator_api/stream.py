"""GET /v1/stream: the events of all daemons as server-sent events."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from aiohttp import web

from nexhb.errors import DatabaseUnavailable
from nexhb.http.operator_api import watched
from nexhb.http.operator_api.admin_key import key_id
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.transport.problem import SERVER, Problem, dumps
from nexhb.http.transport.query import invalid
from nexhb.reading.events import EventFilter

MAX_STREAMS = 20  # per daemon: each stream reads the database for every batch of new events
MAX_STREAMS_PER_KEY = 5
PAGE = 500
CHECK_S = 0.5  # seconds until a client that has closed its connection is noticed
COMMENT_S = 15.0  # seconds; proxies close a connection on which nothing is sent for a minute
WRITE_S = 10.0  # seconds that a client may take to read what is sent
ALWAYS = timedelta(days=3650)
HEADERS = {**SERVER, "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

STREAMS: web.AppKey[Counter[str]] = web.AppKey("streams", Counter)  # open streams by key


async def get_stream(request: web.Request) -> web.StreamResponse:
    """Send events as they are recorded, after `Last-Event-ID` or from now on, until the client or the daemon ends the
    stream."""
    if request.method == "HEAD":
        return web.Response(headers=HEADERS)
    api = request.app[OPERATOR_API]
    chosen, position = _chosen(request, api), _position(request)
    with _counted(request), api.follower.stream() as changed:
        generation = api.follower.generation
        newest = await api.events.newest()
        after = newest if position is None else min(position, newest)  # a restored database has lower numbers
        rows = await _events(api, chosen, after)  # before the response begins, so that errors have their own response
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        try:
            await _write(response, b": connected\n\n")
            while api.follower.generation == generation and request.transport is not None:
                if rows:
                    after = rows[-1]["event_id"]
                    await _write(response, b"".join(map(_message, rows)))
                if len(rows) < PAGE:
                    await _wait(request, response, changed)
                rows = await _events(api, chosen, after)
        except (DatabaseUnavailable, TimeoutError, ConnectionError):
            response.force_close()  # the client connects again, with the number of its last event
        return response


async def end_streams(app: web.Application) -> None:
    """End all streams, so that a stop does not wait for them."""
    app[OPERATOR_API].follower.end_streams()


def _chosen(request: web.Request, api: OperatorApi) -> EventFilter:
    return replace(watched.event_filter(request, api), end=api.now() + ALWAYS)


def _position(request: web.Request) -> int | None:
    """Return the number of the last event that the client has received, None for a new stream. Raise a 400 Problem."""
    text = request.headers.get("Last-Event-ID", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise invalid("Last-Event-ID", "must be the id of an event")
    return int(text)


@contextmanager
def _counted(request: web.Request) -> Iterator[None]:
    """Count the stream while it is open. Raise a 429 Problem if there are too many."""
    open_streams, key = request.app[STREAMS], key_id(request)
    if open_streams.total() >= MAX_STREAMS:
        raise Problem(429, f"This daemon serves {MAX_STREAMS} streams already.", headers={"Retry-After": "60"})
    if open_streams[key] >= MAX_STREAMS_PER_KEY:
        raise Problem(429, f"This key has {MAX_STREAMS_PER_KEY} streams already.", headers={"Retry-After": "60"})
    open_streams[key] += 1
    try:
        yield
    finally:
        open_streams[key] -= 1
        open_streams += Counter()  # removes keys that have none


async def _events(api: OperatorApi, chosen: EventFilter, after: int) -> list[dict[str, Any]]:
    return await api.events.events(chosen, PAGE, after, ascending=True)


async def _wait(request: web.Request, response: web.StreamResponse, changed: asyncio.Event) -> None:
    """Wait until there may be new events, or the client is gone. Meanwhile send comments, so that the connection is not
    idle."""
    idle_s = 0.0
    while not changed.is_set() and request.transport is not None:
        try:
            async with asyncio.timeout(CHECK_S):
                await changed.wait()
        except TimeoutError:
            idle_s += CHECK_S
            if idle_s >= COMMENT_S:
                await _write(response, b":\n\n")
                idle_s = 0.0
    changed.clear()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Send data. Raise TimeoutError if the client does not read."""
    async with asyncio.timeout(WRITE_S):
        await response.write(data)


def _message(row: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: event\ndata: %b\n\n" % (row["event_id"], dumps(row))
