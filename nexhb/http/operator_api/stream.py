"""GET /v1/stream: the events and incidents of all daemons as server-sent events."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from aiohttp import web

from nexhb.errors import DatabaseUnavailable
from nexhb.http.operator_api import silenced, watched
from nexhb.http.operator_api.admin_key import key_id
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.transport.problem import SERVER, Problem, dumps
from nexhb.http.transport.query import invalid
from nexhb.reading.events import MAX_NUMBER, EventFilter, IncidentPosition

MAX_STREAMS = 20  # per daemon: each stream reads the database for every batch of new events
MAX_STREAMS_PER_KEY = 5
PAGE = 500
CHECK_S = 0.5  # seconds until a client that has closed its connection is noticed
COMMENT_S = 15.0  # seconds; proxies close a connection on which nothing is sent for a minute
WRITE_S = 10.0  # seconds that a client may take to read what is sent
ALWAYS = timedelta(days=3650)
_ID = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,16})-([0-9]{1,12}))?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)
HEADERS = {**SERVER, "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

STREAMS: web.AppKey[Counter[str]] = web.AppKey("streams", Counter)  # open streams by key


class _Position(NamedTuple):
    """The last event and the last change of an incident that a client has received."""

    event_id: int
    incident: IncidentPosition


async def get_stream(request: web.Request) -> web.StreamResponse:
    """Send events, and incidents that are opened, widened or resolved, as they are recorded, after `Last-Event-ID` or
    from now on, until the client or the daemon ends the stream."""
    if request.method == "HEAD":
        return web.Response(headers=HEADERS)
    api = request.app[OPERATOR_API]
    chosen, last = _chosen(request, api), _last_id(request)
    with _counted(request), api.follower.stream() as changed:
        generation = api.follower.generation
        position = await _position(api, last)
        # Before the response begins, so that errors have their own response.
        messages, position, is_complete = await _messages(api, chosen, position)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        try:
            await _write(response, b": connected\n\n")
            while api.follower.generation == generation and request.transport is not None:
                if messages:
                    await _write(response, b"".join(messages))
                if is_complete:
                    await _wait(request, response, changed)
                messages, position, is_complete = await _messages(api, chosen, position)
        except (DatabaseUnavailable, TimeoutError, ConnectionError):
            response.force_close()  # the client connects again, with the id of its last message
        return response


async def end_streams(app: web.Application) -> None:
    """End all streams, so that a stop does not wait for them."""
    app[OPERATOR_API].follower.end_streams()


def _chosen(request: web.Request, api: OperatorApi) -> EventFilter:
    return replace(watched.event_filter(request, api), end=api.now() + ALWAYS)


def _last_id(request: web.Request) -> tuple[int, IncidentPosition | None] | None:
    """Parse the id of the last message that the client has received: that of an event (`123`) is its event_id; that of
    an incident (`123-1764547200000000-45`) has the last event before it, the time of the change in µs since 1970, and
    the incident_id. Return None for a new stream. Raise a 400 Problem."""
    text = request.headers.get("Last-Event-ID", "")
    if not text:
        return None
    match = _ID.fullmatch(text)
    if match is None:
        raise invalid("Last-Event-ID", "must be the id of a message of a stream")
    if match[2] is None:
        return int(match[1]), None
    changed_at = _EPOCH + int(match[2]) * _US
    return int(match[1]), IncidentPosition(changed_at, int(match[3]))


async def _position(api: OperatorApi, last: tuple[int, IncidentPosition | None] | None) -> _Position:
    """Return where a stream begins."""
    newest, round_at = await api.events.newest()
    now = round_at or api.now()
    if last is None:
        return _Position(newest, IncidentPosition(now, MAX_NUMBER))
    event_id = min(last[0], newest)  # a restored database has lower numbers
    if last[1] is not None:
        return _Position(event_id, min(last[1], IncidentPosition(now, MAX_NUMBER)))
    # The events of a round are sent before its incidents.
    at = await api.events.recorded_at(event_id)
    return _Position(event_id, IncidentPosition(_EPOCH if at is None else min(at, now), -1))


async def _messages(api: OperatorApi, chosen: EventFilter, position: _Position) -> tuple[list[bytes], _Position, bool]:
    """Return what follows a position: messages, the new position, and whether they are all for now. A round's events
    come before its incidents, whose ids contain the last event."""
    events = await api.events.events(chosen, PAGE, position.event_id, ascending=True)
    messages = [b"id: %d\nevent: event\ndata: %b\n\n" % (row["event_id"], dumps(row)) for row in events]
    if events:
        position = position._replace(event_id=events[-1]["event_id"])
    if len(events) == PAGE:
        return messages, position, False
    changed, round_at = await api.events.changed_incidents(chosen, position.incident, PAGE)
    if changed:
        await silenced.mark_incidents(api, changed, api.now())
    for row in changed:
        at = row.pop("changed_at")
        position = position._replace(incident=IncidentPosition(at, row["incident_id"]))
        message_id = (position.event_id, (at - _EPOCH) // _US, row["incident_id"])
        messages.append(b"id: %d-%d-%d\nevent: incident\ndata: %b\n\n" % (*message_id, dumps(row)))
    if len(changed) == PAGE or round_at is None:
        return messages, position, len(changed) < PAGE
    return messages, position._replace(incident=max(position.incident, IncidentPosition(round_at, MAX_NUMBER))), True


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
