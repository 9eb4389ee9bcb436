"""A database that went away after its schema was looked at, and before the tokens were read, ended the start with a
bare line on stderr, without an event. Found by the fault machine, which asks each end of a daemon for its reason."""

from __future__ import annotations

import io
import json
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from nexhb import daemon, db, log
from nexhb.config import Auth, Server, Settings
from nexhb.config import Database as DatabaseSettings
from nexhb.devices import DeviceStore


async def test_a_start_that_the_database_left_says_so_and_is_to_be_tried_again(
    database: db.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def left(_store: DeviceStore) -> None:
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    monkeypatch.setattr(DeviceStore, "load", left)
    said = io.StringIO()
    log.setup("error", said)
    settings = Settings(
        data_dir=tmp_path,
        server=Server(port=0),
        database=DatabaseSettings(url=SecretStr(database.dsn)),
        auth=Auth(admin_key=SecretStr("admin-key-of-a-start-that-ends")),
    )
    assert await daemon.serve(settings, lambda _: None) == 1
    (one,) = [json.loads(line) for line in said.getvalue().splitlines()]
    assert one["event"] == "daemon.not_started"
    assert one["error"].startswith("ConnectionDoesNotExistError: connection was closed")
