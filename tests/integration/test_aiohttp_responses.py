"""Requests to which aiohttp itself responds. Formerly, the response to CONNECT and `OPTIONS *`, which have no path that
a route could match, was a text with the versions of aiohttp and Python. A client that used HTTP/1.0, which does not
have 100 Continue, received a 100, and mistook it for the final response."""

from __future__ import annotations

import orjson
import pytest

from tests.conftest import Nexhb
from tests.support.hostile import connect, ended


@pytest.mark.parametrize(
    "request_", [b"CONNECT a.b:443 HTTP/1.1\r\nHost: a.b\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_a_request_without_a_path_receives_a_problem(nexhb: Nexhb, request_: bytes) -> None:
    async with connect(nexhb) as (reader, writer):
        writer.write(request_)
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert b"Server: nexhb\r\n" in head + b"\r\n"
    assert b"application/problem+json" in head
    assert orjson.loads(body)["status"] == 404


@pytest.mark.parametrize(("version", "continued"), [(b"1.0", False), (b"1.1", True)])
async def test_only_http_1_1_receives_100_continue(nexhb: Nexhb, version: bytes, continued: bool) -> None:
    async with connect(nexhb) as (reader, writer):
        writer.write(
            b"GET /healthz HTTP/" + version + b"\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        answer = await ended(reader)
    assert answer.startswith(b"HTTP/1.1 100 Continue") == continued
    assert b" 200 OK" in answer
