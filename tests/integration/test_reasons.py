"""Without its database the daemon gives every client a short reason, and operators and the log all details."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import asyncpg
import orjson
import pytest
from pydantic import SecretStr

from nexhb import config, log, supervision
from nexhb.devices import tokens
from nexhb.ingest import batch, parser, writer
from nexhb.ingest.intake import Intake
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Answer, Nexhb, StartDaemon, example


async def shut(cluster: str, name: str, *, allowed: bool) -> None:
    """Reject all connections to the database `name`, or allow them again."""
    conn = await asyncpg.connect(cluster)
    await conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}")
    if not allowed:
        await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    await conn.close()


async def test_only_operators_and_the_log_get_postgresqls_messages(
    start_daemon: StartDaemon, cluster: str, conn: Connection
) -> None:
    """Formerly, /readyz and the 503 responses to devices repeated the messages of PostgreSQL, which contain the host
    and the role."""
    nexhb = await start_daemon(auth=config.AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))
    agent = await nexhb.agent()
    name = await conn.fetchval("SELECT current_database()")
    lines = io.StringIO()
    log.setup(stream=lines)
    await shut(cluster, name, allowed=False)
    try:
        answers = []
        for _ in range(2):  # the first request detects the failure, the second one finds the intake closed
            answers.append(await agent.send(nexhb.clock()))
            answers.append(await Agent(nexhb, "x", tokens.new_token()).send(nexhb.clock()))
            answers.append(await agent.post(orjson.dumps([example(nexhb.clock())]), "/v1/heartbeats"))
            answers.append(await Agent(nexhb, "x", "a key").post(b"{}", "/v1/register"))
        assert {answer.status for answer in answers} == {503}
        assert all("Retry-After" in answer.headers for answer in answers)
        for headers in ({}, {"x-admin": "wrong"}, {"Authorization": "Bearer wrong"}):
            async with nexhb.http.get(f"{nexhb.url}/readyz", headers=headers) as ready:
                assert ready.status == 503
                text = await ready.text()
            assert "The database cannot commit: " in text
            assert name not in text
        assert not [answer.body for answer in answers if name in str(answer.body) or "Error" in str(answer.body)]
        async with asyncio.timeout(SOON_S):  # the first reason is that the connections were terminated
            while name not in str(await nexhb.get("/readyz", 503)):
                pass
        assert name in lines.getvalue()
    finally:
        log.setup(stream=sys.stderr)
        await shut(cluster, name, allowed=True)


async def test_guessing_the_admin_key_at_readyz_is_counted(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(auth=config.AuthSettings(admin_key=SecretStr(ADMIN_KEY), failures_per_minute=1))
    for _ in range(6):
        async with nexhb.http.get(f"{nexhb.url}/readyz", headers={"x-admin": "wrong"}) as ready:
            assert ready.status == 200
    async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers={"x-admin": "wrong"}) as refused:
        assert refused.status == 429


def out_of_memory(times: int, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises MemoryError the first `times` times."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError
        return otherwise(*args, **kwargs)

    return call


@pytest.mark.parametrize("fast", [True, False])
async def test_a_heartbeat_is_503_if_there_is_no_memory_for_it(
    nexhb: Nexhb, now: datetime, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    body = orjson.dumps(example(now, device_id=agent.device_id))
    headers = {} if fast else {"X-Odd": "taken by aiohttp"}
    monkeypatch.setattr(parser, "parse", out_of_memory(2, parser.parse))
    answers: list[Answer] = []
    while not answers or answers[-1].status != 200:
        answers.append(await agent.post(body, **headers))
    assert {answer.status for answer in answers[:-1]} == {503}
    assert all("Retry-After" in answer.headers for answer in answers[:-1])
    assert len(answers) == (2 if fast else 3)  # the fast path fails, and the handler tries again


async def test_a_queue_is_503_if_there_is_no_memory_for_it_and_is_stored_when_sent_again(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, the response was 500. An agent retries after a 500, too, but a 500 names no cause."""
    agent = await nexhb.agent()
    monkeypatch.setattr(parser, "parse_many", out_of_memory(1, parser.parse_many))
    body = orjson.dumps([example(now, device_id=agent.device_id)])
    refused = await agent.post(body, "/v1/heartbeats")
    assert (refused.status, "memory" in refused.body["detail"]) == (503, True)
    assert "Retry-After" in refused.headers
    assert (await agent.post(body, "/v1/heartbeats")).body["written"] == 1


async def test_a_writer_without_memory_retries_and_continues(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    monkeypatch.setattr(batch, "make_plan", out_of_memory(1, batch.make_plan))
    assert (await agent.send(now)).status == 200
    # The same holds if memory runs out in the loop around the batches.
    monkeypatch.setattr(writer, "NO_MEMORY_S", 0.01)
    monkeypatch.setattr(Intake, "next_batch", out_of_memory(1, Intake.next_batch))
    assert (await agent.send(now)).status == 200
    assert not nexhb.running.tasks.failed.done()


async def test_a_sweeper_without_memory_continues(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a task of the daemon ends, the daemon stops; so the sweeper must not end."""
    swept = asyncio.Event()
    monkeypatch.setattr(supervision, "SWEEP_S", 0.01)
    monkeypatch.setattr(Intake, "expire", out_of_memory(2, lambda *_: swept.set()))
    nexhb = await start_daemon()
    async with asyncio.timeout(SOON_S):
        await swept.wait()
    assert not nexhb.running.tasks.failed.done()
