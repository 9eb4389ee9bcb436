"""A bad heartbeat of a queue held the whole block in which it came, 256 kB and its heartbeats: the refusal was kept,
its traceback knows the frame, and the frame knew the refusal. Only the collector ends such a circle, and here it seldom
comes: 200 queues of 1,000 heartbeats with ten bad ones each took 160 MB. A place that was guessed wrong did it too."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import orjson
import pytest

from nexhb import wire
from nexhb.blocks import Blocks
from tests.conftest import example

NOW = datetime.now(UTC)
RULES = wire.Rules("io.unitynodes.unityapp", 10, timedelta(days=7), timedelta(minutes=5))
GOOD = [orjson.dumps(example(NOW - timedelta(minutes=n))) for n in range(300)]
BAD = b'{"timestamp_utc":"yesterday"}'
ODD = orjson.dumps(example(NOW, more=[{"device_id": "begins as the items do"}] * 300))  # so a cut is guessed within


@contextmanager
def no_circles() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
        assert gc.collect() == 0, "objects that only the collector ends"
    finally:
        gc.enable()


def take(body: bytes, block_bytes: int) -> int:
    blocks = Blocks(_parse, item_bytes=2**16, block_bytes=block_bytes)
    blocks.feed(body)
    while blocks.take(last=True) is not None:
        pass
    return blocks.items


def _parse(block: bytes, ndjson: bool) -> wire.Queue:
    return wire.parse_many(
        block, ndjson=ndjson, most=500, device_no=1, device_id="kiosk-1", received_at=NOW, rules=RULES
    )


def _array(*items: bytes) -> bytes:
    return b"[" + b",".join(items) + b"]"


@pytest.mark.parametrize("body", [_array(*GOOD, BAD), b"\n".join([*GOOD, BAD])])
def test_a_refused_heartbeat_holds_nothing(body: bytes) -> None:
    take(body, 2**18)
    with no_circles():
        assert take(body, 2**18) == 301


def test_a_place_that_was_guessed_wrong_holds_nothing() -> None:
    body = _array(*[ODD] * 20)
    take(body, 2**14)
    with no_circles():
        assert take(body, 2**14) == 20


@pytest.mark.parametrize("body", [_array(*GOOD)[:-9], _array(*GOOD, b'"' + b"x" * 2**17 + b'"'), _array(*GOOD) + b"1"])
def test_a_body_that_is_no_list_any_further_holds_nothing(body: bytes) -> None:
    with suppress(wire.Refused):
        take(body, 2**14)
    with no_circles(), suppress(wire.Refused):
        take(body, 2**14)
