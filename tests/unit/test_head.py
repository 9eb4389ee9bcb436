"""The strict parser of a heartbeat's head reads every request that it accepts exactly as aiohttp does."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from nexhb.http.transport import head
from nexhb.http.transport.head import INCOMPLETE, Request, is_bodiless, read

LINE = b"POST /v1/heartbeat HTTP/1.1"
SLASHED = b"POST //v1/heartbeat HTTP/1.1"
TOKEN = b"not-a_token"
AGENT = (
    b"Authorization: Bearer " + TOKEN,
    b"Content-Type: application/json; charset=utf-8",
    b"Content-Length: 7",
    b"Host: heartbeats.example:8443",
    b"Connection: Keep-Alive",
    b"Accept-Encoding: gzip",
    b"User-Agent: okhttp/4.12.0",
)


def request(*fields: bytes, line: bytes = LINE, body: bytes = b'{"a":1}') -> bytes:
    """Return a request with these lines in its head."""
    return b"\r\n".join((line, *fields)) + b"\r\n\r\n" + body


def test_an_agents_request_is_read_whatever_the_case_and_order_of_its_fields() -> None:
    whole = Request(TOKEN, b'{"a":1}')
    assert read(request(*AGENT), 100) == whole
    assert read(request(*AGENT), 100) == whole, "its lines are cached now"
    assert read(request(*reversed(AGENT)), 100) == whole
    assert read(request(*(b":".join((n.upper(), v)) for n, _, v in (f.partition(b":") for f in AGENT))), 100) == whole
    assert read(request(AGENT[0], AGENT[2], AGENT[3]), 100) == whole, "the Content-Type is optional"
    assert read(request(b"authorization:bearer  " + TOKEN + b" ", b"content-length:7", b"host:"), 100) == whole


def test_a_request_with_two_leading_slashes_is_read() -> None:
    assert read(request(*AGENT, line=SLASHED), 100) == Request(TOKEN, b'{"a":1}')


@pytest.mark.parametrize("line", [LINE, SLASHED])
def test_every_prefix_of_a_request_is_incomplete(line: bytes) -> None:
    whole = request(*AGENT, line=line)
    for length in range(len(line) + 2, len(whole)):
        assert read(whole[:length], 100) is INCOMPLETE, whole[:length]
    assert read(whole + b"P", 100) is None, "bytes after the request are ambiguous"


OTHERWISE = {
    "another method": {"line": b"PUT /v1/heartbeat HTTP/1.1"},
    "another path": {"line": b"POST /v1/heartbeats HTTP/1.1"},
    "a query": {"line": b"POST /v1/heartbeat?a=1 HTTP/1.1"},
    "HTTP/1.0": {"line": b"POST /v1/heartbeat HTTP/1.0"},
    "three slashes": {"line": b"POST ///v1/heartbeat HTTP/1.1"},
    "a slash behind": {"line": b"POST /v1/heartbeat/ HTTP/1.1"},
    "two blanks": {"line": b"POST  /v1/heartbeat HTTP/1.1"},
}
FIELDS = {
    "chunks": b"Transfer-Encoding: chunked",
    "an expectation": b"Expect: 100-continue",
    "another protocol": b"Upgrade: websocket",
    "an end": b"Connection: close",
    "an upgrade": b"Connection: Keep-Alive, Upgrade",
    "compression": b"Content-Encoding: gzip",
    "another type": b"Content-Type: text/plain",
    "an admin's key": b"x-admin: key",
    "something unknown": b"X-Unknown: 1",
    "a second host": b"Host: other",
    "a second type": b"Content-Type: application/json",
    "the same agent again": b"User-Agent: okhttp/4.12.0",
    "a second length": b"Content-Length: 7",
    "a second key": b"Authorization: Bearer abc",
    "a length with a sign": b"Content-Length: +7",
    "a continued field": b" folded",
    "a blank before the colon": b"Host : x",
    "a field without a colon": b"Host",
    "a bare LF": b"Host: x\nTransfer-Encoding: chunked",
    "a bare CR": b"Host: x\rTransfer-Encoding: chunked",
    "a NUL": b"Host: x\0",
    "what is no ASCII": b"Host: \xc3\xa4",
}


@pytest.mark.parametrize("changed", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_any_other_request_line_is_left_to_aiohttp(changed: dict[str, bytes]) -> None:
    assert read(request(*AGENT, **changed), 100) is None


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("where", [0, 3, len(AGENT)])
def test_a_field_with_more_meaning_is_left_to_aiohttp(field: bytes, where: int) -> None:
    fields = (*AGENT[:where], field, *AGENT[where:])
    assert read(request(*fields), 100) is None
    assert read(request(*fields), 100) is None, "the refused field must not be cached"


def test_a_request_without_key_or_length_or_with_too_long_a_body_is_left_to_aiohttp() -> None:
    assert read(request(*AGENT[1:]), 100) is None
    assert read(request(AGENT[0], AGENT[3]), 100) is None
    assert read(request(AGENT[0], AGENT[2]), 100) is None, "without Host"
    assert read(request(*AGENT), 6) is None
    assert read(request(AGENT[0], AGENT[3], b"Content-Length: 0", body=b""), 100) is None
    assert read(request(b"Authorization: Basic abc", AGENT[2], AGENT[3]), 100) is None
    assert read(request(b"Authorization: Bearer ", AGENT[2], AGENT[3]), 100) is None
    assert read(request(*AGENT, b"Host: " + b"x" * 5000), 100) is None
    assert read(LINE + b"\r\nHost: " + b"x" * 5000, 100) is None, "a head without an end must be refused"
    assert read(request(AGENT[0], AGENT[3], b"Content-Length: 00000007"), 100) is None


@pytest.mark.parametrize(
    "behind", [b"\nTransfer-Encoding: chunked", b"\rTransfer-Encoding: chunked", b"\0", b"\xc3\xa4"]
)
def test_a_key_or_a_length_that_is_not_plain_text_is_left_to_aiohttp(behind: bytes) -> None:
    """The key and the length are read by code that does not read other lines, so they have a test of their own."""
    assert read(request(b"Authorization: Bearer abc" + behind, AGENT[2], AGENT[3]), 100) is None
    assert read(request(AGENT[0], AGENT[3], b"Content-Length: 7" + behind), 100) is None


def test_keys_and_lengths_are_not_cached() -> None:
    """Keys are secrets, and a cache of keys would have as many entries as there are devices."""
    assert read(request(*AGENT), 100) == Request(TOKEN, b'{"a":1}')
    assert not [line for line in head._harmless if line.lower().startswith((b"authorization", b"content-length"))]


def test_the_cache_of_lines_is_limited() -> None:
    for number in range(3 * head._MAX_CACHED_LINES):
        assert read(request(*AGENT, b"X-Request-Id: %d" % number), 100) == Request(TOKEN, b'{"a":1}')
    assert read(request(*AGENT, b"X-Request-Id: " + b"x" * 1000), 100) is not None
    assert 0 < len(head._harmless) <= head._MAX_CACHED_LINES
    assert max(map(len, head._harmless)) <= head._MAX_CACHED_LENGTH


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /readyz HTTP/1.1\r\n\r\n", True),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /", False),
        (b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nA: b\nContent-Length: 3\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nA: b\r\n Content-Length: 3\r\n\r\n", False),
        (b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"HEAD /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\n", False),
        (b"POST /healthz HTTP/1.1\r\nHost: x\r\n\r\n", False),
        (b"", False),
    ],
)
def test_a_get_without_a_body_is_recognised(data: bytes, whole: bool) -> None:
    assert is_bodiless(data) is whole


_name = st.sampled_from(
    [field.partition(b":")[0] for field in (*AGENT, *FIELDS.values())] + [b"x-forwarded-for", b"Via", b"", b"Host\t"]
)
_value = st.one_of(
    st.sampled_from([field.partition(b":")[2] for field in (*AGENT, *FIELDS.values())]),
    st.sampled_from([b" 7", b" 07", b" 8", b" 7, 7", b"\t7", b" 7\x0b", b" identity", b" Keep-Alive", b""]),
    st.binary(max_size=20),
)
_field = st.one_of(
    st.sampled_from(AGENT), st.sampled_from(list(FIELDS.values())),
    st.builds(lambda name, value: name + b":" + value, _name, _value),
)  # fmt: skip


@given(
    st.sampled_from([LINE, SLASHED]),
    st.lists(_field, max_size=9),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"]),
    st.sampled_from([b'{"a":1}', b'{"a":1', b'{"a":1}}', b"", b"0\r\n\r\n"]),
)
def test_aiohttp_reads_every_accepted_request_in_the_same_way(
    line: bytes, fields: list[bytes], end: bytes, body: bytes
) -> None:
    data = end.join((line, AGENT[0], AGENT[2], AGENT[3], *fields)) + end + end + body
    accepted = read(data, 100)
    if not accepted or accepted is INCOMPLETE:
        return
    loop = asyncio.new_event_loop()
    try:
        protocol = BaseProtocol(loop)
        parser = HttpRequestParser(protocol, loop, 2**16)
        messages, upgraded, tail = parser.feed_data(data)
        assert (len(messages), upgraded, tail) == (1, False, b"")
        message, payload = cast(tuple[Any, Any], messages[0])
        assert (message.method, message.path, message.should_close, message.chunked) == (
            "POST", line.split()[1].decode(), False, False,
        )  # fmt: skip
        assert payload.is_eof()
        assert payload.read_nowait() == accepted.body
        assert message.headers.getall("Authorization")[0].split()[1].encode() == accepted.token
    finally:
        loop.close()
