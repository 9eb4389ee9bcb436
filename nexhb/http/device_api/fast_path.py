"""POST /v1/heartbeat without aiohttp, directly from the connection to the intake.

aiohttp's request, response, stream and task are half the cost of a heartbeat. The fast path does without them, but
serves only a heartbeat that will be admitted: complete, understood to its last byte (see `head`), valid, of a known
device, and with room in the intake. Every other request goes unchanged to aiohttp, whose handlers respond with the
error, so that no rule exists twice. After admission, every verdict gets the same response as from the handler.
"""

from __future__ import annotations

import hashlib
import time
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING

from nexhb import metrics
from nexhb.heartbeat import Refused
from nexhb.http.device_api import admission
from nexhb.http.transport import head

if TYPE_CHECKING:
    from aiohttp import web

    from nexhb.devices.store import Device
    from nexhb.http.device_api.context import DeviceApi
    from nexhb.http.transport.http_connection import HttpConnection
    from nexhb.ingest.intake import Verdict


class FastPath:
    """The interceptor of a daemon's connections that serves heartbeats."""

    def __init__(self, api: DeviceApi) -> None:
        self._api = api
        self._now = api.now
        self._cached_device = api.devices.cached
        self._intake = api.intake
        self._device_rate = api.device_rate
        self._max_body_bytes = api.settings.server.body_max_bytes
        self._observe = metrics.http_request_latency_ms.series("/v1/heartbeat", "POST")

    def read(self, data: bytes) -> head.Request | None:
        """Return the request in `data` as head.read does, with the configured size limit."""
        return head.read(data, self._max_body_bytes)

    def serve(self, connection: HttpConnection, request: head.Request) -> bool:
        """Admit the heartbeat, and respond once it is committed. Return False, without any effect, if aiohttp has to
        serve the request."""
        started = time.perf_counter()
        intake = self._intake
        device = self._cached_device(hashlib.sha256(request.token).digest())
        if device is None or device.revoked or not intake.has_room:
            return False
        if not self._device_rate.acquire(device.device_no, time.monotonic()).allowed:
            return False
        try:
            heartbeat = admission.parse_heartbeat(self._api, request.body, device, self._now())
        except (Refused, MemoryError):
            self._device_rate.give_back(device.device_no)
            return False
        intake.received += 1
        on_settled = partial(self._respond, connection, device, started)
        intake.admit((heartbeat,), len(request.body), on_settled)
        connection.mark_authenticated()
        return True

    def _respond(self, connection: HttpConnection, device: Device, started: float, verdicts: list[Verdict]) -> None:
        try:
            status = self._send(connection, device, verdicts[0])
        except MemoryError:
            connection.cut("no_memory")  # if the connection stayed open, the client would wait for a response
            raise
        self._observe(status, time.perf_counter() - started)

    def _send(self, connection: HttpConnection, device: Device, verdict: Verdict) -> int:
        if problem := admission.problem_of(self._api, device, verdict):
            status, response = problem.status, _as_bytes(problem.response())
        else:
            status, response = 200, admission.response_to(self._api, verdict).as_bytes()
        connection.send_response(response)
        return status


def _as_bytes(response: web.Response) -> bytes:
    """Return the bytes of a response as aiohttp would write it."""
    body = response.body
    assert isinstance(body, bytes)  # noqa: S101 - true for every problem
    fields = {**response.headers, "Content-Length": str(len(body)), "Date": formatdate(time.time(), usegmt=True)}
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
