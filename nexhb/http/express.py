"""POST /v1/heartbeat straight from the connection to the intake and back.

Of what a heartbeat costs, aiohttp's request, response, stream and task are half. This way has none of them, and takes
only a heartbeat that is to be admitted: whole, understood to its last byte (see `head`), of a known device, valid, and
with room in the intake. All others go to aiohttp as they are, whose handlers say what is wrong with them; so no rule
stands twice. What comes after that, a verdict other than "committed", is answered here in the same words.
"""

from __future__ import annotations

import hashlib
import time
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING

from nexhb import metrics, wire
from nexhb.http import head, heartbeats

if TYPE_CHECKING:
    from aiohttp import web

    from nexhb.devices import Device
    from nexhb.http.connections import Guarded
    from nexhb.http.parts import Parts
    from nexhb.intake import Verdict


class Express:
    """Serves one daemon's connections."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._body_most = parts.settings.server.body_max_bytes
        self._observe = metrics.http_request_latency_ms.series("/v1/heartbeat", "POST")

    def read(self, data: bytes) -> head.Request | None:
        """See head.read."""
        return head.read(data, self._body_most)

    def serve(self, connection: Guarded, request: head.Request) -> bool:
        """Take the heartbeat; the connection is answered once it is committed. False where aiohttp has to see it, and
        then nothing happened."""
        started = time.perf_counter()
        parts = self._parts
        device = parts.devices.known(hashlib.sha256(request.token).digest())
        if device is None or device.revoked or not parts.intake.has_room:
            return False
        if parts.device_rate.take(device.device_no, time.monotonic()):
            return False
        try:
            heartbeat = heartbeats.heartbeat_of(parts, request.body, device, parts.now())
        except (wire.Refused, MemoryError):
            parts.device_rate.give_back(device.device_no)
            return False
        parts.intake.received += 1
        settled = partial(self._answer, connection, device, started)
        parts.intake.admit((heartbeat,), len(request.body), settled)
        connection.prove()
        return True

    def _answer(self, connection: Guarded, device: Device, started: float, verdicts: list[Verdict]) -> None:
        try:
            status = self._say(connection, device, verdicts[0])
        except MemoryError:
            connection.cut("no_memory")  # it would wait for its answer for ever
            raise
        self._observe(status, time.perf_counter() - started)

    def _say(self, connection: Guarded, device: Device, verdict: Verdict) -> int:
        if problem := heartbeats.problem_of(self._parts, device, verdict):
            status, said = problem.status, _as_bytes(problem.response())
        else:
            status, said = 200, self._parts.answer_to(verdict).as_bytes()
        connection.answer(said)
        return status


def _as_bytes(response: web.Response) -> bytes:
    """A response as aiohttp would write it."""
    body = response.body
    assert isinstance(body, bytes)  # noqa: S101 - a problem's is
    fields = {**response.headers, "Content-Length": str(len(body)), "Date": formatdate(time.time(), usegmt=True)}
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
