"""Send a device's requests on a TCP connection, without an HTTP client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import orjson

from tests.conftest import SOON_S, Agent, Nexhb, example

AROUND = b"X-Around: no\r\n"  # an unknown header field, because of which aiohttp serves the request


class RawConnection:
    """A TCP connection on which a test sends and receives bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the next response: status, headers, body."""
        async with asyncio.timeout(SOON_S):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *fields = text.strip().split("\r\n")
            headers = dict(field.split(": ", 1) for field in fields)
            return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["Content-Length"]))

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and return the response."""
        self.writer.write(data)
        return await self.answer()


@asynccontextmanager
async def connect(nexhb: Nexhb) -> AsyncIterator[RawConnection]:
    """Open a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(nexhb.url.rpartition(":")[2]))
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()


def post(agent: Agent, made_at: datetime, extra: bytes = b"", **changes: Any) -> bytes:
    """Return the bytes of a heartbeat's request."""
    return post_body(agent, orjson.dumps(example(made_at, device_id=agent.device_id, **changes)), extra)


def post_body(agent: Agent, body: bytes, extra: bytes = b"") -> bytes:
    """Return the bytes of a request with this body."""
    head = f"POST /v1/heartbeat HTTP/1.1\r\nAuthorization: Bearer {agent.token}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + extra + b"Content-Type: application/json\r\nHost: x\r\n\r\n" + body
