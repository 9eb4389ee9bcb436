"""From a silent kiosk to a webhook, through the whole daemon; and what operators can do about messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from nexhb import cli
from nexhb.config import NotifySettings, WatchSettings
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon, shown
from tests.support.receiver import Receiver, receiving
from tests.support.watching import Watched


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that accepts every message."""
    async with receiving() as receiver:
        yield receiver


async def test_a_route_is_told_of_an_outage_and_of_its_end(
    start_daemon: StartDaemon, conn: Connection, now: datetime, receiver: Receiver
) -> None:
    notify = NotifySettings(routes=[receiver.route()])
    watched = await Watched.start(start_daemon, conn, now, notify=notify)
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(11, silent=["a"])
    (opened,) = await receiver.count(1)
    assert opened.summary == ("incident.opened", "Store 42 - kiosk 3 is offline")
    await watched.minutes(1)
    _, resolved = await receiver.count(2)
    assert resolved.summary == ("incident.resolved", "Resolved: Store 42 - kiosk 3 is online again")
    assert opened.body["data"]["incident_id"] == resolved.body["data"]["incident_id"]


# ---- what operators can do ------------------------------------------------------------------------------------------


async def call(nexhb: Nexhb, method: str, path: str, body: object = None, status: int = 200) -> Any:
    """Make an operator's call, check the status, and return the JSON."""
    request = nexhb.http.request(method, nexhb.url + path, json=body, headers={"x-admin": ADMIN_KEY})
    async with request as response:
        content = await response.read()
        assert response.status == status, content
        return orjson.loads(content) if content else None


async def test_silences_are_added_listed_and_removed_over_http(nexhb: Nexhb) -> None:
    await nexhb.agent("kiosk-1")
    until = nexhb.clock() + timedelta(hours=2)
    wanted = {"scope": "device", "value": "kiosk-1", "until": shown(until), "reason": "refit", "created_by": "Ada"}
    added = await call(nexhb, "POST", "/v1/silences", wanted, 201)
    assert added | {"silence_id": 0, "from": "", "created_at": ""} == wanted | {
        "silence_id": 0, "from": "", "created_at": "", "hours": None, "zone": None, "active": True,
    }  # fmt: skip
    nights = {"scope": "fleet", "hours": "22:00-06:00", "zone": "Europe/Berlin", "reason": "nights"}
    recurring = await call(nexhb, "POST", "/v1/silences", nights, 201)
    assert (recurring["until"], recurring["created_by"]) == (None, "127.0.0.1")
    page = await nexhb.get("/v1/silences?limit=1")
    assert (page["silences"], page["next"]) == ([added], added["silence_id"])
    page = await nexhb.get(f"/v1/silences?limit=1&after={page['next']}")
    assert ([one["silence_id"] for one in page["silences"]], page["next"]) == ([recurring["silence_id"]], None)
    await call(nexhb, "DELETE", f"/v1/silences/{added['silence_id']}", status=204)
    await call(nexhb, "DELETE", f"/v1/silences/{added['silence_id']}", status=404)
    await call(nexhb, "DELETE", "/v1/silences/x", status=404)
    assert len((await nexhb.get("/v1/silences"))["silences"]) == 1


REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"until": "2020-01-01T00:00:00Z"}, "until"),
    ({"from": "2999-01-01T00:00:00Z"}, "from"),
    ({"until": "2999-01-01T00:00:00Z"}, "until"),
    ({"until": "tomorrow"}, "until"),
    ({"until": "2999-01-01T00:00:00"}, "until"),
    ({"until": None}, "until"),
    ({"scope": "site", "value": "nowhere"}, "value"),
    ({"scope": "tag", "value": "nothing"}, "value"),
    ({"scope": "device", "value": "nobody"}, "value"),
    ({"scope": "device"}, "value"),
    ({"value": "x"}, "value"),
    ({"scope": "planet"}, "scope"),
    ({"hours": "25:00-x"}, "hours"),
    ({"hours": "22:00-06:00", "zone": "Mars/Base"}, "zone"),
    ({"reason": ""}, "reason"),
    ({"reason": "x" * 501}, "reason"),
    ({"colour": 1}, "colour"),
)


async def test_a_silence_that_is_not_valid_is_refused_by_its_field(nexhb: Nexhb) -> None:
    until = shown(nexhb.clock() + timedelta(hours=2))
    for change, field in REFUSED:
        wanted: dict[str, object] = {"scope": "fleet", "until": until, "reason": "refit"} | change
        answer = await call(nexhb, "POST", "/v1/silences", wanted, 422)
        assert [error["path"] for error in answer["errors"]] == [field], change


async def test_an_incident_is_acknowledged_once(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    number = await conn.fetchval(
        "INSERT INTO incidents (kind, scope, severity, since, opened_at) "
        "VALUES ('offline', 'fleet', 'critical', $1, $1) RETURNING incident_id", now,
    )  # fmt: skip
    first = await call(nexhb, "POST", f"/v1/incidents/{number}/ack", {"by": "Ada"})
    again = await call(nexhb, "POST", f"/v1/incidents/{number}/ack", {})
    assert (first["acked_by"], again) == ("Ada", first)
    await call(nexhb, "POST", f"/v1/incidents/{number + 1}/ack", {}, status=404)
    await call(nexhb, "POST", "/v1/incidents/x/ack", {}, status=404)


async def test_a_test_message_tells_whether_it_arrives_and_the_metric_counts_it(
    start_daemon: StartDaemon, receiver: Receiver
) -> None:
    broken = receiver.route("broken", url="http://127.0.0.1:9/geheim")
    nexhb = await start_daemon(notify=NotifySettings(routes=[receiver.route(), broken]))
    good = await call(nexhb, "POST", "/v1/notify/on-call/test")
    (message,) = receiver.messages
    assert (good["delivered"], good["error"], good["id"]) == (True, None, message.message_id)
    assert message.body["type"] == "nexhb.test"
    bad = await call(nexhb, "POST", "/v1/notify/broken/test")
    assert (bad["delivered"], "connection failed" in bad["error"], "geheim" in bad["error"]) == (False, True, False)
    await call(nexhb, "POST", "/v1/notify/nobody/test", status=404)
    assert await nexhb.metric('nexhb_notifications_total{result="failed",route="broken"}') >= 1


async def test_ping_url_is_fetched_after_a_round(start_daemon: StartDaemon, receiver: Receiver) -> None:
    watch = WatchSettings(interval_seconds=0.1, ping_url=SecretStr(receiver.url + "/ping"))
    await start_daemon(watch=watch)
    assert {message.path for message in await receiver.count(2)} == {"/ping"}


async def test_the_commands_use_the_daemon(
    start_daemon: StartDaemon, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexhb = await start_daemon(notify=NotifySettings(routes=[receiver.route()]))
    await nexhb.agent("kiosk-1")
    monkeypatch.setenv("NEXHB_SERVER__PORT", nexhb.url.rpartition(":")[2])
    monkeypatch.setenv("NEXHB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("NEXHB_AUTH__ADMIN_KEY", ADMIN_KEY)

    async def run(*words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, cli.app, words)
        assert result.exit_code == code or code, result.output
        return result.output + str(result.exception or "")

    cli.register("silence")
    cli.register("notify")
    assert "active    device kiosk-1" in await run(
        "silence", "add", "--device", "kiosk-1", "--for", "2h", "--reason", "refit"
    )
    assert "names no site" in await run("silence", "add", "--site", "x", "--for", "2h", "--reason", "refit", code=2)
    assert "Exactly one" in await run("silence", "add", "--for", "2h", "--reason", "refit", code=2)
    assert "refit, by" in await run("silence", "list")
    await run("silence", "remove", "1")
    assert await run("silence", "list") == ""
    assert "on-call: delivered" in await run("notify", "test", "on-call")
    assert "route is unknown" in await run("notify", "test", "nobody", code=1)
