"""Reads a request's body: bounded in size and time, never decompressed."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from nexhb.http.problem import Problem


def check_headers(request: web.Request, *, most: int, types: tuple[str, ...]) -> None:
    """Refuse, before a byte of the body is read, what would be refused after it."""
    length = request.content_length
    if length is not None and length > most:
        raise Problem(413, f"The body takes at most {most} bytes, this one has {length}.", close=True)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "Compressed bodies are not taken.", headers={"Accept-Encoding": "identity"}, close=True)
    given = request.headers.get("Content-Type")
    if given is not None and given not in types and request.content_type not in types:
        raise Problem(415, f"Content-Type takes {' or '.join(types)}, not {request.content_type}.", close=True)


async def read(request: web.Request, *, most: int, timeout_s: float) -> bytes:
    """The body. Raises a Problem: 413 over `most` bytes, 408 after `timeout_s`, 400 where it breaks off."""
    content = request.content
    if content.is_eof():  # the usual case: it came with the headers, and no timer is needed
        body = content.read_nowait() if content.total_bytes else b""
    else:
        body = await _read_slowly(request, most, timeout_s)
    if len(body) > most:
        raise Problem(413, f"The body takes at most {most} bytes.", close=True)
    return body


async def _read_slowly(request: web.Request, most: int, timeout_s: float) -> bytes:
    """All of it, or more than `most` bytes of a longer one."""
    parts: list[bytes] = []
    size = 0
    pieces = Pieces(request, timeout_s=timeout_s, each_bytes=most)
    while size <= most and (part := await pieces.next()):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


async def read_start(request: web.Request, *, most: int, timeout_s: float) -> bytes:
    """The first `most` bytes of the body, or all of a shorter one. Raises a Problem: 408 after `timeout_s`, 400 where
    it breaks off."""
    return (await _read_slowly(request, most - 1, timeout_s))[:most]


class Pieces:
    """A body as it arrives. Each `each_bytes` of it may take `timeout_s`, waits between two calls not counted."""

    def __init__(self, request: web.Request, *, timeout_s: float, each_bytes: int) -> None:
        self._content = request.content
        self._timeout_s = timeout_s
        self._each_bytes = each_bytes
        self._left_s = timeout_s
        self._got = 0

    async def next(self) -> bytes:
        """What has come, or comes next; nothing at the end. Raises a Problem: 408 where it takes too long, 400 where it
        breaks off."""
        content = self._content
        started = time.monotonic()
        try:
            if content.is_eof():  # the usual case: it is all there, and no timer is needed
                return content.read_nowait() if content.total_bytes else b""
            async with asyncio.timeout(self._left_s):
                piece = await content.readany()
        except TimeoutError:
            raise Problem(408, f"The body did not arrive within {self._timeout_s:g} s.", close=True) from None
        except (web.RequestPayloadError, ConnectionError) as error:
            raise Problem(400, f"The body broke off: {error}", close=True) from None
        self._left_s -= time.monotonic() - started
        self._got += len(piece)
        if self._got >= self._each_bytes:
            self._left_s, self._got = self._timeout_s, 0
        return piece
