"""One device's HTTP: a connection that is kept, a request, and what the device can know of it afterwards."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import NamedTuple

from bench.fleet import Device
from tests.faults.record import What

ANSWER_S = 5.0  # the agent's 30 s, scaled as the daemon's answer_within_seconds is
REST_S = 1.0  # for the rest of an answer whose head is there
_BEHIND_THE_WRITER = ("Not committed", "Not all")  # of a 503: the heartbeat was taken, and may be in


class Heard(NamedTuple):
    """What came of a request."""

    what: What
    said: str
    deduplicated: int = 0
    refused: int = 0  # of a list: items that were called bad


class Line:
    """A device's way to the daemon."""

    def __init__(self, device: Device, port: int) -> None:
        self._port = port
        self._head = (
            f"HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {device.token}\r\n"
            "Connection: Keep-Alive\r\nUser-Agent: okhttp/4.12.0\r\nContent-Type: "
        )
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, bodies: list[bytes]) -> Heard:
        """Send one heartbeat, or several as a list. A head that says 2xx is an acknowledgement, whatever follows."""
        one = len(bodies) == 1
        body = bodies[0] if one else b"\n".join(bodies)
        path, content = ("heartbeat", "application/json") if one else ("heartbeats", "application/x-ndjson")
        head = f"POST /v1/{path} {self._head}{content}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._exchange(head.encode() + body)
        except TimeoutError:
            self.close()
            return Heard(What.UNKNOWN, "no answer in time")
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            return Heard(What.UNKNOWN, type(error).__name__)

    def close(self) -> None:
        """Cut it."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, request: bytes) -> Heard:
        if self._streams is None or self._streams[1].transport.is_closing():
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                return Heard(What.REFUSED, f"no connection: {type(error).__name__}")
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        body = b""
        with suppress(asyncio.IncompleteReadError, OSError, TimeoutError):
            async with asyncio.timeout(REST_S):
                length = int(head.partition("content-length:")[2].split("\r\n", 1)[0])
                body = await reader.readexactly(length)
        if not body or "connection: close" in head:
            self.close()
        return _heard(status, body)


def _heard(status: int, body: bytes) -> Heard:
    said = json.loads(body) if body else {}
    if 200 <= status < 300:
        refused = len(said.get("refused", ()))
        return Heard(What.ACKNOWLEDGED, str(status), int(said.get("deduplicated", 0)), refused)
    if status >= 500 or status == 408:
        taken = not body or said.get("detail", "").startswith(_BEHIND_THE_WRITER)
        return Heard(What.UNKNOWN if taken else What.REFUSED, str(status))
    return Heard(What.TURNED_AWAY, f"{status} {said.get('detail', '')}".replace(",", ";"))
