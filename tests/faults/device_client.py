"""The HTTP client of one device: it keeps its connection, sends requests, and reports what the device knows after each
request."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import NamedTuple

from bench.fleet import Device
from tests.faults.journal import Event

TIMEOUT_S = 5.0  # the agent's timeout of 30 s, scaled down like the daemon's answer_within_seconds
BODY_TIMEOUT_S = 1.0  # timeout for the body of a response, once its head was received
# The beginnings of `detail` in a 503 for heartbeats that have reached the writer: they may be stored.
_REACHED_THE_WRITER = ("Not committed", "Not all")


class RequestOutcome(NamedTuple):
    """What a device knows after a request."""

    event: Event
    detail: str  # the status of the response, or why there is none
    deduplicated: int = 0
    rejected: int = 0  # items of a list that the daemon rejected


class DeviceConnection:
    """A device's connection to the daemon."""

    def __init__(self, device: Device, port: int) -> None:
        self._port = port
        self._head = (
            f"HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {device.token}\r\n"
            "Connection: Keep-Alive\r\nUser-Agent: okhttp/4.12.0\r\nContent-Type: "
        )
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, bodies: list[bytes]) -> RequestOutcome:
        """Send one heartbeat, or several as a list, and return the outcome. A response whose status is 2xx is an
        acknowledgement, even if its body does not arrive."""
        is_single = len(bodies) == 1
        body = bodies[0] if is_single else b"\n".join(bodies)
        path, content = ("heartbeat", "application/json") if is_single else ("heartbeats", "application/x-ndjson")
        head = f"POST /v1/{path} {self._head}{content}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._exchange(head.encode() + body)
        except TimeoutError:
            self.close()
            return RequestOutcome(Event.UNKNOWN, "no response in time")
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            return RequestOutcome(Event.UNKNOWN, type(error).__name__)

    def close(self) -> None:
        """Abort the connection if it is open."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, request: bytes) -> RequestOutcome:
        if self._streams is None or self._streams[1].transport.is_closing():
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                return RequestOutcome(Event.REFUSED, f"no connection: {type(error).__name__}")
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        body = b""
        with suppress(asyncio.IncompleteReadError, OSError, TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                length = int(head.partition("content-length:")[2].split("\r\n", 1)[0])
                body = await reader.readexactly(length)
        if not body or "connection: close" in head:
            self.close()
        return _outcome(status, body)


def _outcome(status: int, body: bytes) -> RequestOutcome:
    response = json.loads(body) if body else {}
    if 200 <= status < 300:
        rejected = len(response.get("refused", ()))
        return RequestOutcome(Event.ACKNOWLEDGED, str(status), int(response.get("deduplicated", 0)), rejected)
    if status >= 500 or status == 408:
        may_be_stored = not body or response.get("detail", "").startswith(_REACHED_THE_WRITER)
        return RequestOutcome(Event.UNKNOWN if may_be_stored else Event.REFUSED, str(status))
    return RequestOutcome(Event.REJECTED, f"{status} {response.get('detail', '')}".replace(",", ";"))
