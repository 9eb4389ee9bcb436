"""Read the body of a request within limits of size and time; bodies are never decompressed."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TypeVar

import msgspec
from aiohttp import web

from nexhb.heartbeat import FieldError
from nexhb.http.transport.problem import Problem

MAX_OBJECT_BYTES = 16_384
T = TypeVar("T")
_FIELD = re.compile(r" - at `\$\.?(.*)`$|(?<=unknown field) `(.*)`$", re.DOTALL)  # the field in msgspec's message


def check_headers(request: web.Request, *, max_bytes: int, types: tuple[str, ...]) -> None:
    """Raise a Problem if the headers show that the body would be refused, before any of it is read."""
    length = request.content_length
    if length is not None and length > max_bytes:
        raise Problem(413, f"The body has {length} bytes; at most {max_bytes} are accepted.", close=True)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "Compressed bodies are not accepted.", headers={"Accept-Encoding": "identity"}, close=True)
    header = request.headers.get("Content-Type")
    if header is not None and header not in types and request.content_type not in types:
        raise Problem(415, f"Content-Type must be {' or '.join(types)}, not {request.content_type}.", close=True)


async def read(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body. Raise a Problem: 413 if the body is longer than `max_bytes`, 408 after `timeout_s`, 400 if the
    body is incomplete."""
    content = request.content
    if content.is_eof():  # the usual case: the body came with the headers, and no timer is needed
        body = content.read_nowait() if content.total_bytes else b""
    else:
        body = await _read_slowly(request, max_bytes, timeout_s)
    if len(body) > max_bytes:
        raise Problem(413, f"The body has more than {max_bytes} bytes.", close=True)
    return body


async def _read_slowly(request: web.Request, max_bytes: int, timeout_s: float) -> bytes:
    """Return the whole body; of a body longer than `max_bytes`, return the start, which is longer than `max_bytes`."""
    parts: list[bytes] = []
    size = 0
    pieces = Pieces(request, timeout_s=timeout_s, each_bytes=max_bytes)
    while size <= max_bytes and (part := await pieces.next()):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


async def read_start(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the first `max_bytes` of the body, or all of a shorter one. Raise a Problem: 408 after `timeout_s`, 400 if
    the body is incomplete."""
    return (await _read_slowly(request, max_bytes - 1, timeout_s))[:max_bytes]


async def read_object(request: web.Request, shape: type[T], *, timeout_s: float) -> T:
    """Return the body, a JSON object of the given shape; no body is an empty object. Raise a Problem: 400 if it is
    not JSON, 422 that names the field if it has another shape, and those of check_headers and read."""
    check_headers(request, max_bytes=MAX_OBJECT_BYTES, types=("application/json",))
    raw = await read(request, max_bytes=MAX_OBJECT_BYTES, timeout_s=timeout_s)
    try:
        return msgspec.json.decode(raw or b"{}", type=shape)
    except msgspec.ValidationError as error:
        message, field = str(error), ""
        if match := _FIELD.search(message):
            message, field = message[: match.start()], match[1] or match[2]
        shown = f"{field}: {message}" if field else message
        raise Problem(422, f"{shown}.", errors=[FieldError(field[:100], message)]) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The request is not valid: {error}") from None


class Pieces:
    """A body that is read while it arrives. Each `each_bytes` bytes have to arrive within `timeout_s`, not counting the
    time between two calls of `next`."""

    def __init__(self, request: web.Request, *, timeout_s: float, each_bytes: int) -> None:
        self._content = request.content
        self._timeout_s = timeout_s
        self._each_bytes = each_bytes
        self._left_s = timeout_s
        self._received = 0

    async def next(self) -> bytes:
        """Return the next bytes that arrive, or b"" at the end. Raise a Problem: 408 if they take too long, 400 if the
        body is incomplete."""
        content = self._content
        started = time.monotonic()
        try:
            if content.is_eof():  # the usual case: all of it has arrived, and no timer is needed
                return content.read_nowait() if content.total_bytes else b""
            async with asyncio.timeout(self._left_s):
                piece = await content.readany()
        except TimeoutError:
            raise Problem(408, f"The body did not arrive within {self._timeout_s:g} s.", close=True) from None
        except (web.RequestPayloadError, ConnectionError) as error:
            raise Problem(400, f"The body is incomplete: {error}", close=True) from None
        self._left_s -= time.monotonic() - started
        self._received += len(piece)
        if self._received >= self._each_bytes:
            self._left_s, self._received = self._timeout_s, 0
        return piece
