"""A connection on which the body of a queue is sent by hand."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import orjson

from tests.conftest import SOON_S, Agent


class RawConnection:
    """A connection on which a body is sent by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, agent: Agent, length: int) -> RawConnection:
        """Open a connection, and wait until the handler reads the body."""
        connection = cls(*await asyncio.open_connection("127.0.0.1", urlsplit(agent.nexhb.url).port))
        connection._writer.write(
            f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\nConnection: close\r\n"
            f"Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        await connection._reader.readuntil(b" 100 Continue\r\n\r\n")
        return connection

    async def send(self, part: bytes) -> None:
        self._writer.write(part)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, Any]]:
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), SOON_S)).decode().lower()
        body = await self._reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        self.cut()
        return int(head.split()[1]), orjson.loads(body)

    def cut(self) -> None:
        self._writer.transport.abort()
