"""POST /v1/heartbeat: one heartbeat. For queues see `queues`."""

from __future__ import annotations

from aiohttp import web

from nexhb import metrics
from nexhb.devices.store import Device
from nexhb.errors import Overloaded
from nexhb.heartbeat import Refused
from nexhb.http.device_api import admission
from nexhb.http.device_api.context import DEVICE_API, DeviceApi
from nexhb.http.transport import body
from nexhb.http.transport.problem import Problem

_JSON = ("application/json",)


async def post_heartbeat(request: web.Request) -> web.StreamResponse:
    """Store one heartbeat, and respond once it is committed."""
    api = request.app[DEVICE_API]
    device, raw = await _receive(request, api)
    admission.check_current(api, device)
    api.intake.received += 1
    try:
        verdicts = api.intake.submit([admission.parse_heartbeat(api, raw, device, api.now())], len(raw))
    except Refused as refused:
        metrics.heartbeats_refused.labels(reason="invalid").inc()
        raise Problem(refused.status, "The heartbeat is not valid.", errors=refused.errors) from None
    except (Overloaded, MemoryError) as error:
        metrics.heartbeats_failed.labels(reason="overloaded").inc()
        api.device_rate.give_back(device.device_no)
        raise await admission.paced_refusal(request, api, error) from None
    [verdict] = await verdicts
    if problem := admission.problem_of(api, device, verdict):
        raise problem
    return admission.response_to(api, verdict).to(request)


async def _receive(request: web.Request, api: DeviceApi) -> tuple[Device, bytes]:
    """Return the sender and the body of a heartbeat."""
    server = api.settings.server
    device = await admission.authenticate_sender(request, api, max_bytes=server.body_max_bytes, types=_JSON)
    return device, await body.read(request, max_bytes=server.body_max_bytes, timeout_s=server.body_timeout_seconds)
