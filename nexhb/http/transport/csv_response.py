"""Respond with rows as CSV, page by page, so that a slow client holds neither a database connection nor a snapshot."""

from __future__ import annotations

import asyncio
import csv
import io
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from aiohttp import web

from nexhb import log
from nexhb.errors import described
from nexhb.http.transport.problem import SERVER, dumps

_log = log.get("http")

WRITE_S = 30.0  # seconds that a client may take to read PIECE_BYTES; slower clients are disconnected
PIECE_BYTES = 2**16
# A spreadsheet evaluates a cell that begins with one of these characters as a formula. The last four are the full-width
# forms of = + - @ (OWASP, "CSV Injection").
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")

Row = Mapping[str, object]


async def stream_csv(
    request: web.Request, columns: Sequence[str], pages: AsyncIterator[Sequence[Row]], filename: str
) -> web.StreamResponse:
    """Respond with a header line and the rows of all pages, of which it writes these columns; return the response.

    The next page is requested only when the client has read most of the last one. An exception of the first page is
    raised, and can have a response of its own. If a later page fails, or the client does not read, the connection is
    reset: the client receives an error instead of a list that looks complete.
    """
    response = web.StreamResponse(headers=_headers(filename))
    page = await anext(pages, None)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    try:
        await _write(response, _lines([columns]))
        while page is not None:
            await _write(response, _lines([cell(row.get(column)) for column in columns] for row in page))
            page = await anext(pages, None)
    except Exception as error:
        _log.warning("http.csv_aborted", path=request.path, error=described(error))
        _reset(request)
    return response


def _reset(request: web.Request) -> None:
    """Reset the connection. A normal close would be the end of the list for a client of HTTP/1.0."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _headers(filename: str) -> dict[str, str]:
    return {
        **SERVER,
        "Content-Type": "text/csv; charset=utf-8; header=present",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "Cache-Control": "no-store",
    }


def cell(value: object) -> object:
    """Return the value as a cell: null as an empty one, times in RFC 3339 with Z, lists with blanks between their
    items, numbers as they are. A text that a spreadsheet would evaluate gets a leading apostrophe."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return value
    text = _text(value)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _text(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return dumps(value).decode() if isinstance(value, Mapping) else str(value)


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Send data in pieces. Raise TimeoutError if the client does not read a piece in time."""
    for start in range(0, len(data), PIECE_BYTES):
        async with asyncio.timeout(WRITE_S):
            await response.write(data[start : start + PIECE_BYTES])
