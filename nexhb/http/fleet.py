"""What operators ask of the fleet."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from operator import itemgetter

import msgspec
from aiohttp import web

from nexhb import rollout
from nexhb.http import query
from nexhb.http.parts import PARTS
from nexhb.http.problem import Problem, answer
from nexhb.reads import Found, Offline, OneDevice, Question, UnityDown

PAGE_MOST = 1_000
LIST_MOST = 10_000


def _device_id(request: web.Request) -> str:
    device_id = request.match_info["device_id"]
    if len(device_id) > 100 or "\0" in device_id:
        raise Problem(404, "No such device is known.")
    return device_id


async def get_fleet(request: web.Request) -> web.Response:
    """Counts of the whole fleet."""
    parts = request.app[PARTS]
    now = parts.now()
    offline_after = timedelta(seconds=parts.settings.heartbeat.offline_after_seconds)
    return answer({"as_of": now, **await parts.reads.fleet(now, offline_after)})


async def get_devices(request: web.Request) -> web.Response:
    """A page of status rows; `next` is the `after` of the page behind it, null on the last one."""
    parts = request.app[PARTS]
    limit = query.number(request, "limit", 100, 1, PAGE_MOST)
    rows = await parts.reads.devices(query.text(request, "after"), limit + 1)
    more = len(rows) > limit
    rows = rows[:limit]
    return answer({"devices": rows, "next": rows[-1]["device_id"] if more else None})


async def get_offline(request: web.Request) -> web.Response:
    """Devices silent for longer than `minutes`."""
    default = request.app[PARTS].settings.heartbeat.offline_after_seconds
    minutes = query.number(request, "minutes", 0, 1, 525_600)
    silent_for = timedelta(minutes=minutes) if minutes else timedelta(seconds=default)
    limit = query.number(request, "limit", LIST_MOST, 1, LIST_MOST)
    return await _list(request, Offline(silent_for, limit))


async def get_unity_down(request: web.Request) -> web.Response:
    """Devices seen within 24 h whose Unity app does not run."""
    return await _list(request, UnityDown(query.number(request, "limit", LIST_MOST, 1, LIST_MOST)))


async def get_device(request: web.Request) -> web.Response:
    """One device and its last status."""
    device_id = _device_id(request)
    parts = request.app[PARTS]
    _, found = await _ask(request, OneDevice(device_id), device_id, parts.now())
    refusal, shared = await parts.reads.troubles(device_id)
    # What this daemon saw within the last minute is not written yet.
    seen, seen_shared = parts.troubles.last_refusal(device_id), parts.troubles.token_shared(device_id)
    latest = max((one for one in (refusal, seen) if one), key=itemgetter("at"), default=None)
    return answer(
        msgspec.structs.asdict(found.rows[0]) | {"last_refusal": latest, "token_shared": shared or seen_shared}
    )


async def _list(request: web.Request, question: Offline | UnityDown) -> web.Response:
    now = request.app[PARTS].now()
    # By request, since a list has no device: a caller that wants the same way again repeats its x-request-id.
    key = request.headers.get("x-request-id") or str(random.random())  # noqa: S311 - no secret
    source, found = await _ask(request, question, key, now)
    return answer({"count": found.count, "as_of": now, "source": source, "devices": found.rows})


async def _ask(request: web.Request, question: Question, key: str, now: datetime) -> tuple[str, Found]:
    """The answer and where it comes from, as the flags say; perf_diff may ask it again, both ways."""
    parts = request.app[PARTS]
    flags = parts.flags.current
    fast = flags.read_from_last_status and rollout.is_in(key, flags.rollout_percent)
    answers = parts.reads if fast else parts.legacy
    found = await answers.ask(question, now)
    parts.perf_diff.offer(question)
    return answers.source, found


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
