"""Formerly, if the database became unavailable after its schema was checked and before the tokens were read, the start
ended with a plain line on stderr, without an event. `make faults` found this, because it requires a reason for each end
of a daemon."""

from __future__ import annotations

import io
import json
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from nexhb import log, service
from nexhb.config import AuthSettings, DatabaseSettings, ServerSettings, Settings
from nexhb.devices.store import DeviceStore
from nexhb.postgres import connections


async def test_a_start_without_the_database_logs_an_event_and_returns_exit_code_1(
    database: connections.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(_store: DeviceStore) -> None:
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    monkeypatch.setattr(DeviceStore, "load", unavailable)
    stream = io.StringIO()
    log.setup("error", stream)
    settings = Settings(
        data_dir=tmp_path,
        server=ServerSettings(port=0),
        database=DatabaseSettings(url=SecretStr(database.dsn)),
        auth=AuthSettings(admin_key=SecretStr("admin-key-of-a-start-that-ends")),
    )
    assert await service.serve(settings, lambda _: None) == 1
    (event,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert event["event"] == "daemon.not_started"
    assert event["error"].startswith("ConnectionDoesNotExistError: connection was closed")
