"""Time limits of bodies that arrive slowly."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any, cast

import pytest
from aiohttp import web

from nexhb.http.transport import body
from nexhb.http.transport.problem import Problem


class Slow:
    """A request whose body arrives in pieces of `size` bytes, each `takes_s` after it was awaited."""

    def __init__(self, size: int, takes_s: float) -> None:
        self.content = self
        self.now = 0.0
        self._size, self._takes_s = size, takes_s

    def monotonic(self) -> float:
        return self.now

    def is_eof(self) -> bool:
        return False

    async def readany(self) -> bytes:
        await asyncio.sleep(0)
        self.now += self._takes_s
        return b"x" * self._size


@pytest.mark.parametrize(("size", "in_time"), [(1_000, True), (400, True), (200, False), (1, False)])
async def test_the_time_limit_applies_to_each_so_many_bytes(
    size: int, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(size, takes_s=10)
    monkeypatch.setattr(body, "time", slow)
    pieces = body.Pieces(cast(web.Request, cast(Any, slow)), timeout_s=31, each_bytes=1_000)

    with nullcontext() if in_time else pytest.raises(Problem) as caught:
        for _ in range(20):
            assert len(await pieces.next()) == size
    assert in_time or (caught and caught.value.status == 408)
