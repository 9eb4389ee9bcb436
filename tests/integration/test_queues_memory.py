"""Formerly, if a body was abandoned (after a 400, 408 or 413, or because its client disconnected), the part that had
arrived stayed in memory, up to 512 kB each: the request's queue referred to its splitter, and the splitter to the
queue, through a method. Only the garbage collector breaks such a cycle, and it counts objects, not bytes: 400 such
bodies used 155 MB of a daemon that needs a few hundred kB per request."""

from __future__ import annotations

import gc
from datetime import datetime

import orjson
import pytest

from nexhb.config import ServerSettings
from nexhb.http.device_api import queues
from nexhb.ingest.block_splitter import BlockSplitter
from tests.conftest import StartDaemon, example
from tests.support.queue_connection import RawConnection


@pytest.mark.parametrize("end", [b'"' + b"x" * 2**19 + b'"]', b"", b"!" * 2**16])
async def test_an_abandoned_body_is_freed_with_its_request(
    start_daemon: StartDaemon, now: datetime, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexhb = await start_daemon(server=ServerSettings(port=0, shutdown_timeout_seconds=2, body_timeout_seconds=1))
    agent = await nexhb.agent()
    part = orjson.dumps([example(now)])[:-1] + b","
    gc.collect()
    gc.disable()
    try:
        connection = await RawConnection.to(agent, len(part) + len(end) + 1)
        await connection.send(part + end)
        assert (await connection.answer())[0] in (400, 408, 413)
        held = [one for one in gc.get_objects() if isinstance(one, BlockSplitter | queues._Queue)]
    finally:
        gc.enable()
    assert held == []
