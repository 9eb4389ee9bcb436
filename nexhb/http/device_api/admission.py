"""The rules that heartbeats share, whichever way they arrive (`fast_path`, `heartbeats`, `queues`): who may send them,
how they are parsed and counted, and what their senders receive."""

from __future__ import annotations

import random
import time
from datetime import datetime

from aiohttp import web

from nexhb import log, metrics
from nexhb.devices.store import Device
from nexhb.errors import Overloaded
from nexhb.heartbeat import Heartbeat
from nexhb.http.device_api import authentication, backpressure
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.transport import body
from nexhb.http.transport.http_connection import HttpConnection
from nexhb.http.transport.prebuilt_response import PrebuiltResponse
from nexhb.http.transport.problem import Problem, dumps
from nexhb.ingest import parser
from nexhb.ingest.intake import DEDUPLICATED, Outcome, Verdict

_log = log.get("heartbeats")
MAX_MISMATCHES_LOGGED = 10_000  # devices


async def authenticate_sender(
    request: web.Request, api: DeviceApi, *, max_bytes: int, types: tuple[str, ...]
) -> Device:
    """Return the sender of heartbeats. Raise a Problem, before the body is read, if the intake is full, the token is
    not valid, the device sends too often, or the body would be refused."""
    try:
        api.intake.check()
    except Overloaded as error:
        raise await paced_refusal(request, api, error) from None
    device = await authentication.authenticate(request, api)
    enforce_rate(api, device, 1)
    body.check_headers(request, max_bytes=max_bytes, types=types)
    return device


def check_current(api: DeviceApi, device: Device) -> None:
    """Raise a 503 Problem if the database was replaced since the device's token was looked up: the device's number may
    belong to another device in the new database."""
    if not api.devices.is_current(device):
        raise api.unavailability.retry_later("The database was replaced by another one.")


def enforce_rate(api: DeviceApi, device: Device, heartbeats: int, *, admitted: int = 0) -> None:
    """Raise a 429 Problem if the device sends far more than a healthy one: a kiosk in a tight loop must not use up the
    capacity of the others. The device keeps its heartbeats, as after every response other than 2xx. `admitted` is the
    number of heartbeats of the same request that were admitted before; the device will send them again, so Retry-After
    allows for them too."""
    now = time.monotonic()
    if heartbeats > 0 and not api.device_rate.acquire(device.device_no, now, heartbeats).allowed:
        wait_s = api.device_rate.retry_after_s(device.device_no, now, admitted + heartbeats)
        metrics.rate_limited.labels(kind="device").inc()
        raise Problem(
            429, "This device sends too often.", headers={"Retry-After": str(1 + int(wait_s))}, close=heartbeats == 1
        )


async def paced_refusal(request: web.Request, api: DeviceApi, error: Overloaded | MemoryError) -> Problem:
    """Wait for the pacer, then return a 503: thousands of refusals at once would take the event loop from the
    writer."""
    wait_s = api.refusal_pacer.wait_s(time.monotonic())
    if wait_s and isinstance(request.protocol, HttpConnection):
        await request.protocol.pause(wait_s)
    if isinstance(error, MemoryError):
        return api.unavailability.because_of(error)
    return api.unavailability.retry_later(str(error))


def parse_heartbeat(api: DeviceApi, raw: bytes, device: Device, received_at: datetime) -> Heartbeat:
    """Parse a body, and count the anomalies of its heartbeat. Raise Refused."""
    heartbeat = parser.parse(
        raw,
        device_no=device.device_no,
        device_id=device.device_id,
        received_at=received_at,
        rules=api.rules,
    )
    count_anomalies(api, device, heartbeat)
    return heartbeat


def count_anomalies(api: DeviceApi, device: Device, heartbeat: Heartbeat) -> None:
    """Count a wrong clock, a queue on the device, dropped fields and a foreign device_id in the metrics."""
    api.troubles.look(heartbeat)
    if heartbeat.clock_wrong:
        metrics.clock_outside_window.inc()
    if heartbeat.queue_depth is not None:
        metrics.device_queue_depth.observe(heartbeat.queue_depth)
    for field in heartbeat.dropped:
        metrics.fields_dropped.labels(field=field).inc()
    if heartbeat.claimed_device_id is not None:
        _report_mismatch(api.mismatch_logged, device, heartbeat.claimed_device_id)


def _report_mismatch(logged: set[int], device: Device, claimed: str) -> None:
    """Count every foreign device_id, but log only the first of each device: a kiosk sends it every minute."""
    metrics.device_id_mismatch.inc()
    if device.device_no not in logged and len(logged) < MAX_MISMATCHES_LOGGED:
        logged.add(device.device_no)
        _log.warning("heartbeat.device_id_mismatch", device_id=device.device_id, claimed=claimed)


def problem_of(api: DeviceApi, device: Device, verdict: Verdict) -> Problem | None:
    """Return the problem to respond with if the heartbeat is not stored, or None if it is stored."""
    if verdict.outcome is Outcome.REFUSED:
        field = verdict.errors[0].path if verdict.errors else None
        api.troubles.refused(device, 422, "The heartbeat cannot be stored.", field)
        return Problem(422, "The heartbeat cannot be stored.", errors=verdict.errors)
    if verdict.outcome is Outcome.FAILED:
        # A retry of a heartbeat that was not stored must not count towards the rate limit.
        api.device_rate.give_back(device.device_no)
        return api.unavailability.retry_later(f"Not committed: {verdict.reason}. Keep it and send it again.")
    return None


def response_to(api: DeviceApi, verdict: Verdict) -> PrebuiltResponse:
    """Return the response to a committed heartbeat. Responses are cached by interval, a few hundred at most."""
    key = (next_heartbeat_s(api), verdict is DEDUPLICATED)
    response = api.responses.get(key)
    if response is None:
        value = {"ok": True, "next_heartbeat_seconds": key[0], "deduplicated": key[1]}
        response = api.responses.setdefault(key, PrebuiltResponse(dumps(value)))
    return response


def next_heartbeat_s(api: DeviceApi) -> int:
    """Return the interval after which a device should send its next heartbeat."""
    heartbeat = api.settings.heartbeat
    usual, offline_after_s = heartbeat.interval_seconds, heartbeat.offline_after_seconds
    fill_ratio = api.intake.fill_ratio
    if fill_ratio <= backpressure.CALM:
        return usual
    return backpressure.interval_s(usual, offline_after_s, fill_ratio, random.random())  # noqa: S311 - no secret
