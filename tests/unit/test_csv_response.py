"""A list as CSV: what a cell looks like, and that a response which is not complete does not look complete."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from nexhb.http.transport import csv_response
from nexhb.http.transport.csv_response import Row, cell, stream_csv
from tests.conftest import SOON_S

Client = TestClient[web.Request, web.Application]
Pages = Callable[[], AsyncIterator[Sequence[Row]]]


@asynccontextmanager
async def served(pages: Pages, columns: Sequence[str] = ("id", "note")) -> AsyncIterator[Client]:
    """Serve these pages at /list."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream_csv(request, columns, pages(), "list.csv")

    app = web.Application()
    app.router.add_get("/list", handler)
    async with TestClient(TestServer(app)) as client:
        yield client


@asynccontextmanager
async def connected(client: Client) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection that reads a few bytes ahead at most."""
    url = client.make_url("/list")
    reader, writer = await asyncio.open_connection(str(url.host), url.port or 0, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def lines(client: Client) -> list[list[str]]:
    async with client.get("/list") as response:
        assert response.status == 200
        return list(csv.reader(io.StringIO((await response.read()).decode(), newline="")))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_a_text_that_a_spreadsheet_would_evaluate_gets_an_apostrophe(start: str) -> None:
    assert cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"
    assert cell([f"{start}tag", "b"]) == f"'{start}tag b"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (-61, -61),
        (-0.5, -0.5),
        (True, "true"),
        ("a=b", "a=b"),
        (datetime(2026, 11, 24, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))), "2026-11-24T00:02:03Z"),
        (datetime(2026, 11, 24, 1, 2, 3, 4000, tzinfo=UTC), "2026-11-24T01:02:03.004000Z"),
        (["front", "4k"], "front 4k"),
        ({"a": 1}, '{"a":1}'),
    ],
)
def test_numbers_times_and_lists_have_one_form(value: object, expected: object) -> None:
    assert cell(value) == expected


async def test_all_pages_are_one_table_with_a_header_and_quoted_cells() -> None:
    async def pages() -> AsyncIterator[Sequence[Row]]:
        yield [{"id": "a", "note": 'says "hi", twice', "hidden": 1}]
        yield []
        yield [{"id": "b", "note": "two\nlines"}, {"id": "ü"}]

    async with served(pages) as client:
        assert await lines(client) == [["id", "note"], ["a", 'says "hi", twice'], ["b", "two\nlines"], ["ü", ""]]
        async with client.get("/list") as response:
            assert response.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
            assert response.headers["Content-Disposition"] == 'attachment; filename="list.csv"'
        async with client.head("/list") as response:
            assert (response.status, response.content_type) == (200, "text/csv")


async def test_no_rows_are_a_header_alone() -> None:
    async def pages() -> AsyncIterator[Sequence[Row]]:
        for page in list[Sequence[Row]]():
            yield page

    async with served(pages) as client:
        assert await lines(client) == [["id", "note"]]


async def failing_pages() -> AsyncIterator[Sequence[Row]]:
    yield [{"id": "a", "note": ""}]
    raise ConnectionError("the database is gone")


async def test_a_page_that_fails_ends_the_response_with_an_error() -> None:
    async with served(failing_pages) as client, client.get("/list") as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_a_client_of_http_1_0_does_not_mistake_a_failure_for_the_end() -> None:
    """Its list ends with the connection: a connection that was closed as usual looked like the whole list."""
    async with served(failing_pages) as client, connected(client) as (reader, writer):
        writer.write(b"GET /list HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_a_first_page_that_fails_has_a_response_of_its_own() -> None:
    async def pages() -> AsyncIterator[Sequence[Row]]:
        for _ in range(1):
            raise web.HTTPConflict
        yield []

    async with served(pages) as client, client.get("/list") as response:
        assert response.status == 409


async def test_a_client_that_does_not_read_is_disconnected_and_keeps_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_response, "WRITE_S", 0.2)
    made, aborted = 0, asyncio.Event()

    async def pages() -> AsyncIterator[Sequence[Row]]:
        nonlocal made
        try:
            for made in range(10_000):
                yield [{"id": made, "note": "x" * 1000}] * 500
        finally:
            aborted.set()

    async with served(pages) as client, connected(client) as (_, writer):
        writer.write(b"GET /list HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(SOON_S):
            await aborted.wait()
        assert made < 100  # the sockets' buffers hold no more
