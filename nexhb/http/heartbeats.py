"""POST /v1/heartbeat. Queues are in `queues`."""

from __future__ import annotations

import time
from datetime import datetime

from aiohttp import web

from nexhb import log, metrics, wire
from nexhb.devices import Device
from nexhb.errors import Overloaded
from nexhb.http import auth, body
from nexhb.http.connections import Guarded
from nexhb.http.parts import PARTS, Parts
from nexhb.http.problem import Problem
from nexhb.intake import Outcome, Verdict

_log = log.get("heartbeats")
_JSON = ("application/json",)
_mismatch_logged: set[int] = set()


async def post_heartbeat(request: web.Request) -> web.StreamResponse:
    """One heartbeat; answered once it is committed."""
    parts = request.app[PARTS]
    device, raw = await _receive(request, parts)
    parts.check_current(device)
    parts.intake.received += 1
    try:
        asked = parts.intake.ask([heartbeat_of(parts, raw, device, parts.now())], len(raw))
    except wire.Refused as refused:
        metrics.heartbeats_refused.labels(reason="invalid").inc()
        raise Problem(refused.status, "The heartbeat is not valid.", errors=refused.errors) from None
    except (Overloaded, MemoryError) as error:
        metrics.heartbeats_failed.labels(reason="overloaded").inc()
        parts.device_rate.give_back(device.device_no)
        raise await _refusal_in_turn(request, parts, error) from None
    [verdict] = await asked
    if problem := problem_of(parts, device, verdict):
        raise problem
    return parts.answer_to(verdict).to(request)


def problem_of(parts: Parts, device: Device, verdict: Verdict) -> Problem | None:
    """What to answer to a heartbeat that is not in; None for one that is."""
    if verdict.outcome is Outcome.REFUSED:
        field = verdict.errors[0].path if verdict.errors else None
        parts.troubles.refused(device, 422, "The heartbeat cannot be stored.", field)
        return Problem(422, "The heartbeat cannot be stored.", errors=verdict.errors)
    if verdict.outcome is Outcome.FAILED:
        # Who sends again what we could not keep does not come too often.
        parts.device_rate.give_back(device.device_no)
        return parts.come_back(f"Not committed: {verdict.reason}. Keep it and send it again.")
    return None


async def _receive(request: web.Request, parts: Parts) -> tuple[Device, bytes]:
    """Who sends, and what."""
    server = parts.settings.server
    device = await sender_of(request, parts, most=server.body_max_bytes, types=_JSON)
    return device, await body.read(request, most=server.body_max_bytes, timeout_s=server.body_timeout_seconds)


async def sender_of(request: web.Request, parts: Parts, *, most: int, types: tuple[str, ...]) -> Device:
    """Who sends. Over the intake's bound nothing more is read; nor is it of somebody unknown, or what is too large."""
    try:
        parts.intake.check()
    except Overloaded as error:
        raise await _refusal_in_turn(request, parts, error) from None
    device = await auth.device_of(request, parts)
    hold_to_rate(parts, device, 1)
    body.check_headers(request, most=most, types=types)
    return device


def hold_to_rate(parts: Parts, device: Device, heartbeats: int, *, taken: int = 0) -> None:
    """Raise a 429 Problem where one device sends far more than any healthy one: a kiosk in a tight loop must not cost
    the others theirs. It keeps what it has, as at any answer that is no 2xx; what of its request is `taken` already
    comes again too, and needs its time as well."""
    now = time.monotonic()
    if heartbeats > 0 and parts.device_rate.take(device.device_no, now, heartbeats):
        wait_s = parts.device_rate.take(device.device_no, now, taken + heartbeats)  # refused as well
        metrics.rate_limited.labels(kind="device").inc()
        raise Problem(
            429, "This device sends too often.", headers={"Retry-After": str(1 + int(wait_s))}, close=heartbeats == 1
        )


async def _refusal_in_turn(request: web.Request, parts: Parts, error: Overloaded | MemoryError) -> Problem:
    """A 503 at its time: refusals by the thousand would leave the writer no turn of the event loop."""
    wait_s = parts.refusals.wait_s(time.monotonic())
    if wait_s and isinstance(request.protocol, Guarded):
        await request.protocol.pause(wait_s)
    return parts.unavailable(error) if isinstance(error, MemoryError) else parts.come_back(str(error))


def heartbeat_of(parts: Parts, raw: bytes, device: Device, received_at: datetime) -> wire.Heartbeat:
    """A body as a heartbeat, its oddities counted. Raises wire.Refused."""
    heartbeat = wire.parse(
        raw,
        device_no=device.device_no,
        device_id=device.device_id,
        received_at=received_at,
        rules=parts.rules,
    )
    note(parts, device, heartbeat)
    return heartbeat


def note(parts: Parts, device: Device, heartbeat: wire.Heartbeat) -> None:
    """Count what is odd about it."""
    parts.troubles.look(heartbeat)
    if heartbeat.clock_wrong:
        metrics.clock_outside_window.inc()
    if heartbeat.queue_depth is not None:
        metrics.device_queue_depth.observe(heartbeat.queue_depth)
    for field in heartbeat.dropped:
        metrics.fields_dropped.labels(field=field).inc()
    if heartbeat.claimed_device_id is not None:
        _note_mismatch(device, heartbeat.claimed_device_id)


def _note_mismatch(device: Device, claimed: str) -> None:
    """Counted each time, logged once a device and run: a kiosk says it every minute."""
    metrics.device_id_mismatch.inc()
    if device.device_no not in _mismatch_logged and len(_mismatch_logged) < 10_000:
        _mismatch_logged.add(device.device_no)
        _log.warning("heartbeat.device_id_mismatch", device_id=device.device_id, claimed=claimed)
