"""What a daemon without its database says: to whoever asks, a reason; to operators, and in the log, all of it."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson
import pytest
from pydantic import SecretStr

from nexhb import batch, config, daemon, devices, log, wire, writer
from nexhb.db import Connection
from nexhb.intake import Intake
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Answer, Nexhb, StartDaemon, example


async def shut(cluster: str, name: str, *, allowed: bool) -> None:
    """Let nobody into the database `name`, or let everybody in again."""
    conn = await asyncpg.connect(cluster)
    await conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}")
    if not allowed:
        await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    await conn.close()


async def test_the_databases_own_words_are_for_operators_and_the_log(
    start_daemon: StartDaemon, cluster: str, conn: Connection
) -> None:
    """/readyz and the 503s of devices repeated them, with the host and the role."""
    nexhb = await start_daemon(auth=config.Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))
    agent = await nexhb.agent()
    name = await conn.fetchval("SELECT current_database()")
    lines = io.StringIO()
    log.setup(stream=lines)
    await shut(cluster, name, allowed=False)
    try:
        said = []
        for _ in range(2):  # the first finds it out, the second meets an intake that is closed
            said.append(await agent.send(datetime.now(UTC)))
            said.append(await Agent(nexhb, "x", devices.new_token()).send(datetime.now(UTC)))
            said.append(await agent.post(orjson.dumps([example(datetime.now(UTC))]), "/v1/heartbeats"))
            said.append(await Agent(nexhb, "x", "a key").post(b"{}", "/v1/register"))
        assert {answer.status for answer in said} == {503}
        assert all("Retry-After" in answer.headers for answer in said)
        for headers in ({}, {"x-admin": "wrong"}, {"Authorization": "Bearer wrong"}):
            async with nexhb.http.get(f"{nexhb.url}/readyz", headers=headers) as ready:
                assert ready.status == 503
                text = await ready.text()
            assert "The database cannot commit: " in text
            assert name not in text
        assert not [answer.body for answer in said if name in str(answer.body) or "Error" in str(answer.body)]
        async with asyncio.timeout(SOON_S):  # the first reason is that the connections were ended
            while name not in str(await nexhb.get("/readyz", 503)):
                pass
        assert name in lines.getvalue()
    finally:
        log.setup(stream=sys.stderr)
        await shut(cluster, name, allowed=True)


async def test_guessing_the_admin_key_at_readyz_counts_as_anywhere(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(auth=config.Auth(admin_key=SecretStr(ADMIN_KEY), failures_per_minute=1))
    for _ in range(6):
        async with nexhb.http.get(f"{nexhb.url}/readyz", headers={"x-admin": "wrong"}) as ready:
            assert ready.status == 200
    async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers={"x-admin": "wrong"}) as refused:
        assert refused.status == 429


def out_of_memory(times: int, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function that has not enough memory so many times."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError
        return otherwise(*args, **kwargs)

    return call


@pytest.mark.parametrize("fast", [True, False])
async def test_a_heartbeat_for_which_there_is_no_memory_is_503(
    nexhb: Nexhb, now: datetime, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    body = orjson.dumps(example(now, device_id=agent.device_id))
    headers = {} if fast else {"X-Odd": "taken by aiohttp"}
    monkeypatch.setattr(wire, "parse", out_of_memory(2, wire.parse))
    answers: list[Answer] = []
    while not answers or answers[-1].status != 200:
        answers.append(await agent.post(body, **headers))
    assert {answer.status for answer in answers[:-1]} == {503}
    assert all("Retry-After" in answer.headers for answer in answers[:-1])
    assert len(answers) == (2 if fast else 3)  # what the fast path could not do, the other way tried


async def test_a_queue_for_which_there_is_no_memory_is_503_and_sent_again_it_is_in(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 500, at which an agent comes again too, but which says that nobody knows why."""
    agent = await nexhb.agent()
    monkeypatch.setattr(wire, "parse_many", out_of_memory(1, wire.parse_many))
    body = orjson.dumps([example(now, device_id=agent.device_id)])
    refused = await agent.post(body, "/v1/heartbeats")
    assert (refused.status, "memory" in refused.body["detail"]) == (503, True)
    assert "Retry-After" in refused.headers
    assert (await agent.post(body, "/v1/heartbeats")).body["written"] == 1


async def test_a_writer_without_memory_tries_again_and_lives(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    monkeypatch.setattr(batch, "make", out_of_memory(1, batch.make))
    assert (await agent.send(now)).status == 200
    # And in the loop around the batches.
    monkeypatch.setattr(writer, "NO_MEMORY_S", 0.01)
    monkeypatch.setattr(Intake, "take", out_of_memory(1, Intake.take))
    assert (await agent.send(now)).status == 200
    assert not nexhb.running.failed.done()


async def test_a_sweeper_without_memory_sweeps_again(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any task of the daemon that ends, ends the daemon."""
    swept = asyncio.Event()
    monkeypatch.setattr(daemon, "SWEEP_S", 0.01)
    monkeypatch.setattr(Intake, "expire", out_of_memory(2, lambda *_: swept.set()))
    nexhb = await start_daemon()
    async with asyncio.timeout(10):
        await swept.wait()
    assert not nexhb.running.failed.done()
