"""What had come of a body that was given up (400, 408, 413, a client that went) stayed in memory, up to 512 kB each:
the request's queue knew its blocks, and these the queue, by its method. Only the collector ends such a circle, and it
counts objects, not bytes: 400 such bodies took 155 MB of a daemon that holds a few hundred kB a request."""

from __future__ import annotations

import gc
from datetime import datetime

import orjson
import pytest

from nexhb.blocks import Blocks
from nexhb.config import Server
from nexhb.http import queues
from tests.conftest import StartDaemon, example
from tests.integration.test_queues import Line


@pytest.mark.parametrize("end", [b'"' + b"x" * 2**19 + b'"]', b"", b"!" * 2**16])
async def test_a_body_that_was_given_up_is_gone_with_its_request(
    start_daemon: StartDaemon, now: datetime, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexhb = await start_daemon(server=Server(port=0, shutdown_timeout_seconds=2, body_timeout_seconds=1))
    agent = await nexhb.agent()
    part = orjson.dumps([example(now)])[:-1] + b","
    gc.collect()
    gc.disable()
    try:
        line = await Line.to(agent, len(part) + len(end) + 1)
        await line.send(part + end)
        assert (await line.answer())[0] in (400, 408, 413)
        held = [one for one in gc.get_objects() if isinstance(one, Blocks | queues._Queue)]
    finally:
        gc.enable()
    assert held == []
