"""CONNECT and `OPTIONS *` have no path that a route could match: aiohttp answered them itself, as text, with its
version and Python's. And HTTP/1.0, which knows no 100 Continue, was sent one, which it takes for the answer."""

from __future__ import annotations

import orjson
import pytest

from tests.conftest import Nexhb
from tests.integration.test_hostile_clients import ended, line_to


@pytest.mark.parametrize(
    "request_", [b"CONNECT a.b:443 HTTP/1.1\r\nHost: a.b\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_what_has_no_path_is_a_problem_too(nexhb: Nexhb, request_: bytes) -> None:
    async with line_to(nexhb) as (reader, writer):
        writer.write(request_)
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert b"Server: nexhb\r\n" in head + b"\r\n"
    assert b"application/problem+json" in head
    assert orjson.loads(body)["status"] == 404


@pytest.mark.parametrize(("version", "continued"), [(b"1.0", False), (b"1.1", True)])
async def test_only_who_knows_it_is_told_to_continue(nexhb: Nexhb, version: bytes, continued: bool) -> None:
    async with line_to(nexhb) as (reader, writer):
        writer.write(
            b"GET /healthz HTTP/" + version + b"\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        answer = await ended(reader)
    assert answer.startswith(b"HTTP/1.1 100 Continue") == continued
    assert b" 200 OK" in answer
