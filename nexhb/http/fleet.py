"""What operators ask of the fleet."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from aiohttp import web

from nexhb.http.parts import PARTS
from nexhb.http.problem import Problem, answer
from nexhb.wire import FieldError

PAGE_MOST = 1_000
LIST_MOST = 10_000
_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
_LATEST = datetime(2080, 1, 1, tzinfo=UTC)


def _bad(name: str, message: str) -> Problem:
    return Problem(400, f"The parameter {name} is not valid.", errors=[FieldError(name, message)])


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
        raise _bad(name, f"takes a whole number from {low} to {high}")
    return int(text)


def _moment(request: web.Request, name: str, default: datetime) -> datetime:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        # A "+" of an offset arrives as a space where the caller did not escape it.
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        if moment.tzinfo is None:
            raise _bad(name, "needs a time zone: 2026-11-24T00:00:00Z")
        # "Everything" is often written as year 1 or 9999, which PostgreSQL's arithmetic and ours do not reach.
        return min(max(moment.astimezone(UTC), _EARLIEST), _LATEST)
    except OverflowError:  # year 1 or 9999, with an offset
        return _EARLIEST if moment.year == 1 else _LATEST
    except ValueError:
        raise _bad(name, "takes an ISO 8601 time with zone: 2026-11-24T00:00:00Z") from None


def _text(request: web.Request, name: str) -> str:
    text = request.query.get(name, "")
    if len(text) > 100 or "\0" in text:
        raise _bad(name, "takes up to 100 characters")
    return text


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
    limit = _number(request, "limit", 100, 1, PAGE_MOST)
    rows = await parts.reads.devices(_text(request, "after"), limit + 1)
    more = len(rows) > limit
    rows = rows[:limit]
    return answer({"devices": rows, "next": rows[-1]["device_id"] if more else None})


async def get_offline(request: web.Request) -> web.Response:
    """Devices silent for longer than `minutes`."""
    parts = request.app[PARTS]
    now = parts.now()
    default = parts.settings.heartbeat.offline_after_seconds
    minutes = _number(request, "minutes", 0, 1, 525_600)
    silent_for = timedelta(minutes=minutes) if minutes else timedelta(seconds=default)
    limit = _number(request, "limit", LIST_MOST, 1, LIST_MOST)
    count, rows = await parts.reads.offline(now, silent_for, limit)
    return answer({"count": count, "as_of": now, "source": "last_status", "devices": rows})


async def get_unity_down(request: web.Request) -> web.Response:
    """Devices seen within 24 h whose Unity app does not run."""
    parts = request.app[PARTS]
    now = parts.now()
    count, rows = await parts.reads.unity_down(now, _number(request, "limit", LIST_MOST, 1, LIST_MOST))
    return answer({"count": count, "as_of": now, "source": "last_status", "devices": rows})


async def get_device(request: web.Request) -> web.Response:
    """One device and its last status."""
    return answer(await request.app[PARTS].reads.device(_device_id(request)))


async def get_history(request: web.Request) -> web.Response:
    """One device's heartbeats, from ≤ ts < to, newest first; the last 24 hours unless told otherwise."""
    parts = request.app[PARTS]
    device_id = _device_id(request)
    # A clock may be ahead by accept_future, and what it sent must be seen.
    end = _moment(request, "to", parts.now() + parts.settings.ingest.accept_future)
    start = _moment(request, "from", end - timedelta(hours=24))
    limit = _number(request, "limit", 100, 1, LIST_MOST)
    return answer({"device_id": device_id, "heartbeats": await parts.reads.history(device_id, start, end, limit)})
