"""Send bytes that no HTTP client would send, and return what the server sends back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from nexhb import config
from tests.conftest import SOON_S, Nexhb

HEAD = b"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\n"


@asynccontextmanager
async def connect(nexhb: Nexhb) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a TCP connection, without an HTTP client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(nexhb.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def ended(reader: asyncio.StreamReader, within_s: float = SOON_S) -> bytes:
    """Return everything received until the other side closes. Raise TimeoutError."""
    async with asyncio.timeout(within_s):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


SHORT = config.ServerSettings(port=0, shutdown_timeout_seconds=2, head_timeout_seconds=0.5)


async def raw(nexhb: Nexhb, *pieces: bytes) -> bytes:
    """Send these pieces of bytes unchanged, one by one; return everything received until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(nexhb.url).port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        return await asyncio.wait_for(reader.read(), SOON_S)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
