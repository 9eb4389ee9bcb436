"""Formerly, a bad heartbeat of a queue kept its whole block in memory, 256 kB and its heartbeats: the traceback of the
stored exception referred to the frame, and the frame to the exception. Only the garbage collector breaks such a cycle,
and here it runs seldom: 200 queues of 1,000 heartbeats with ten bad ones each used 160 MB. A wrong guess of the place
to split the body had the same effect."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import orjson
import pytest

from nexhb.heartbeat import Refused
from nexhb.ingest import parser
from nexhb.ingest.block_splitter import BlockSplitter
from tests.conftest import example
from tests.support.clock import START

NOW = START
RULES = parser.HeartbeatRules("io.unitynodes.unityapp", 10, timedelta(days=7), timedelta(minutes=5))
GOOD = [orjson.dumps(example(NOW - timedelta(minutes=n))) for n in range(300)]
BAD = b'{"timestamp_utc":"yesterday"}'
ODD = orjson.dumps(example(NOW, more=[{"device_id": "begins as the items do"}] * 300))  # a split may be guessed in it


@contextmanager
def no_circles() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
        assert gc.collect() == 0, "objects that only the garbage collector frees"
    finally:
        gc.enable()


def take(body: bytes, block_bytes: int) -> int:
    blocks = BlockSplitter(_parse, item_bytes=2**16, block_bytes=block_bytes)
    blocks.feed(body)
    while blocks.next_block(last=True) is not None:
        pass
    return blocks.items


def _parse(block: bytes, ndjson: bool) -> parser.ParsedQueue:
    return parser.parse_many(
        block, ndjson=ndjson, max_items=500, device_no=1, device_id="kiosk-1", received_at=NOW, rules=RULES
    )


def _array(*items: bytes) -> bytes:
    return b"[" + b",".join(items) + b"]"


@pytest.mark.parametrize("body", [_array(*GOOD, BAD), b"\n".join([*GOOD, BAD])])
def test_a_refused_heartbeat_keeps_no_memory(body: bytes) -> None:
    take(body, 2**18)
    with no_circles():
        assert take(body, 2**18) == 301


def test_a_block_that_was_cut_at_a_wrong_place_keeps_no_memory() -> None:
    body = _array(*[ODD] * 20)
    take(body, 2**14)
    with no_circles():
        assert take(body, 2**14) == 20


@pytest.mark.parametrize("body", [_array(*GOOD)[:-9], _array(*GOOD, b'"' + b"x" * 2**17 + b'"'), _array(*GOOD) + b"1"])
def test_a_list_that_becomes_invalid_keeps_no_memory(body: bytes) -> None:
    with suppress(Refused):
        take(body, 2**14)
    with no_circles(), suppress(Refused):
        take(body, 2**14)
