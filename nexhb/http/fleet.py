"""What operators ask of the fleet."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from operator import itemgetter

import msgspec
from aiohttp import web

from nexhb import rollout
from nexhb.http import query
from nexhb.http.parts import PARTS, Parts
from nexhb.http.problem import Problem, answer
from nexhb.presence import Presence
from nexhb.reads import Found, Offline, OneDevice, Place, Question, UnityDown

PAGE_MOST = 1_000
LIST_MOST = 10_000
_PLACE = re.compile(r"((?:19[7-9]|2[01]\d)\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)/(.+)", re.ASCII | re.DOTALL)


def _device_id(request: web.Request) -> str:
    device_id = request.match_info["device_id"]
    if len(device_id) > 100 or "\0" in device_id:
        raise Problem(404, "No such device is known.")
    return device_id


def _at(known: Presence) -> dict[str, datetime | None]:
    """The moment of an answer, and since when silence means something: null while no daemon takes heartbeats."""
    return {"as_of": known.now, "taking_heartbeats_since": known.taking_since}


def _offline_after(parts: Parts) -> timedelta:
    return timedelta(seconds=parts.settings.heartbeat.offline_after_seconds)


async def get_fleet(request: web.Request) -> web.Response:
    """Counts of the whole fleet."""
    parts = request.app[PARTS]
    known, counts = await parts.reads.fleet(parts.now(), _offline_after(parts))
    return answer({**_at(known), **counts})


async def get_devices(request: web.Request) -> web.Response:
    """A page of status rows; `next` is the `after` of the page behind it, null on the last one."""
    parts = request.app[PARTS]
    limit = query.number(request, "limit", 100, 1, PAGE_MOST)
    after = query.text(request, "after")
    known, rows = await parts.reads.devices(after, limit + 1, parts.now(), _offline_after(parts))
    more = len(rows) > limit
    rows = rows[:limit]
    return answer({**_at(known), "devices": rows, "next": rows[-1].device_id if more else None})


async def get_offline(request: web.Request) -> web.Response:
    """Devices silent for longer than `minutes`."""
    minutes = query.number(request, "minutes", 0, 1, 525_600)
    silent_for = timedelta(minutes=minutes) if minutes else _offline_after(request.app[PARTS])
    limit = query.number(request, "limit", LIST_MOST, 1, LIST_MOST)
    return await _list(request, Offline(silent_for, limit, _after(request)))


async def get_unity_down(request: web.Request) -> web.Response:
    """Devices heard within 24 h whose Unity app does not run, and which of them are online."""
    limit = query.number(request, "limit", LIST_MOST, 1, LIST_MOST)
    return await _list(request, UnityDown(_offline_after(request.app[PARTS]), limit, _after(request)))


async def get_device(request: web.Request) -> web.Response:
    """One device and its last status."""
    parts, device_id = request.app[PARTS], _device_id(request)
    question = OneDevice(device_id, _offline_after(parts))
    _, known, found = await _ask(request, question, device_id, parts.now())
    refusal, shared = await parts.reads.troubles(device_id)
    # What this daemon saw within the last minute is not written yet.
    seen, seen_shared = parts.troubles.last_refusal(device_id), parts.troubles.token_shared(device_id)
    latest = max((one for one in (refusal, seen) if one), key=itemgetter("at"), default=None)
    troubles = {"last_refusal": latest, "token_shared": shared or seen_shared}
    return answer({**_at(known), **msgspec.structs.asdict(found.rows[0]), **troubles})


def _after(request: web.Request) -> Place | None:
    """The `next` of the page before: when its last device was last heard, and its id."""
    text = query.text(request, "after", longest=150)
    if not text:
        return None
    found = _PLACE.fullmatch(text)
    with suppress(ValueError):
        if found:
            return Place(datetime.fromisoformat(found[1]), found[2])
    raise query.bad("after", "takes the next of the page before")


def _next(found: Found) -> str | None:
    last = found.following
    return last and f"{last.heard_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}/{last.device_id}"


async def _list(request: web.Request, question: Offline | UnityDown) -> web.Response:
    now = request.app[PARTS].now()
    # By request, since a list has no device: a caller that wants the same way again repeats its x-request-id.
    key = request.headers.get("x-request-id") or str(random.random())  # noqa: S311 - no secret
    source, known, found = await _ask(request, question, key, now)
    return answer({"count": found.count, **_at(known), "source": source, "devices": found.rows, "next": _next(found)})


async def _ask(request: web.Request, question: Question, key: str, now: datetime) -> tuple[str, Presence, Found]:
    """The answer and where it comes from, as the flags say; perf_diff may ask it again, both ways."""
    parts = request.app[PARTS]
    flags = parts.flags.current
    fast = flags.read_from_last_status and rollout.is_in(key, flags.rollout_percent)
    answers = parts.reads if fast else parts.legacy
    known, found = await answers.ask(question, now)
    parts.perf_diff.offer(question)
    return answers.source, known, found


async def get_history(request: web.Request) -> web.Response:
    """One device's heartbeats, from ≤ ts < to, newest first; the last 24 hours unless told otherwise. `next` is the
    `after` of the page behind it, null on the last one."""
    parts = request.app[PARTS]
    device_id = _device_id(request)
    # A clock may be ahead by accept_future, and what it sent must be seen.
    end = query.moment(request, "to", parts.now() + parts.settings.ingest.accept_future)
    start = query.moment(request, "from", end - timedelta(hours=24))
    limit = query.number(request, "limit", 100, 1, LIST_MOST)
    after = query.number(request, "after", -1, 0, 2**31)
    rows, following = await parts.reads.history(device_id, start, end, limit, None if after < 0 else after)
    return answer({"device_id": device_id, "heartbeats": rows, "next": None if following is None else str(following)})
