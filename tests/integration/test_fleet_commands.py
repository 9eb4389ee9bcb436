"""Commands that show the fleet: over HTTP, from the running daemon, as tables and as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest

from nexhb import cli
from nexhb.cli import fleet
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, SOON_S, StartDaemon
from tests.support import forks
from tests.support.watching import Watched

Run = Callable[..., Awaitable[list[str]]]


@pytest.fixture
async def watched(start_daemon: StartDaemon, conn: Connection, now: datetime) -> Watched:
    """A site of three devices, of which two are silent; elsewhere, Unity of `d` is down."""
    watched = await Watched.start(start_daemon, conn, now)
    await watched.add("a", "b", "c", site="store-42")
    await watched.add("d", "e", "f", "g")
    await watched.minutes(1)
    watched.kiosks["d"].changes = {"unity_process_running": False}
    await watched.minutes(11, silent=["a", "b"])
    return watched


@pytest.fixture
def run(watched: Watched, tmp_path: Path) -> Run:
    """Return a function that runs a command and returns the lines that it prints."""
    port = watched.nexhb.url.rpartition(":")[2]
    env = {"NEXHB_SERVER__PORT": port, "ADMIN_KEY": ADMIN_KEY, "NEXHB_DATA_DIR": str(tmp_path), "PATH": ""}

    async def command(*arguments: str, code: int = 0) -> list[str]:
        done = await asyncio.to_thread(forks.run, "nexhb", arguments, env=env, timeout=50)
        assert done.returncode == code, done.stderr
        return (done.stdout if code == 0 else done.stderr).splitlines()

    return command


async def cells(run: Run, *arguments: str) -> list[list[str]]:
    """Return the cells of a list, without its header."""
    return [line.split("\t") for line in (await run(*arguments))[1:]]


async def test_commands_show_the_fleet_and_what_happened_to_it(run: Run) -> None:
    assert "offline: 2" in (lines := await run("fleet"))
    assert "offline_by_cause: 2 site" in lines
    assert [(row[0], row[3], row[6]) for row in await cells(run, "offline")] == [
        ("a", "store-42", "site"), ("b", "store-42", "site"),
    ]  # fmt: skip
    assert await cells(run, "offline", "--site", "elsewhere") == []
    assert [row[0] for row in await cells(run, "unity-down")] == ["d"]
    assert [row[0] for row in await cells(run, "get", "devices", "--limit", "2")] == ["a", "b"]
    assert (await cells(run, "get", "sites"))[0][5:] == ["3", "1", "2", "0", ""]
    events = await cells(run, "get", "events", "--kind", "offline")
    assert {(row[3], row[5], row[6]) for row in events} == {("a", "offline", "site"), ("b", "offline", "site")}
    assert [row[2:4] for row in await cells(run, "get", "incidents")] == [["offline", "site"], ["unity_down", "device"]]
    assert "unity_running: no" in await run("device", "d")
    assert len(await cells(run, "history", "d", "--limit", "3")) == 3
    assert json.loads((await run("offline", "--json", "--limit", "1"))[0])["devices"][0]["cause"] == "site"


async def test_lists_are_limited_and_sorted_by_the_same_options(run: Run) -> None:
    assert [row[0] for row in await cells(run, "get", "devices", "--state", "offline", "--q", "A")] == ["a"]
    assert [row[0] for row in await cells(run, "offline", "--battery-below", "50", "--sort", "device_id")] == []
    assert [row[0] for row in await cells(run, "unity-down", "--clock-right", "--agent-version", "1.0.9")] == ["d"]
    below = await cells(run, "get", "devices", "--unity-pkg-version-below", "2.2", "--sort", "heard_at", "--limit", "2")
    assert [row[0] for row in below] == ["a", "b"]
    assert await cells(run, "unity-down", "--limited") == []
    [line] = await run("get", "devices", "--state", "asleep", code=cli.EXIT_USAGE)
    assert line.startswith("nexhb: The input is not valid. state must be online, offline,")


async def test_an_incident_is_acknowledged_and_a_silence_is_shown(run: Run) -> None:
    number = (await cells(run, "get", "incidents", "--site", "store-42"))[0][0]
    [line] = await run("incident", "ack", number)
    assert line.startswith(f"incident {number}: acknowledged at ")
    by = json.loads((await run("incident", "ack", number, "--json"))[0])["acked_by"]
    assert line.endswith(f" by {by}")
    assert "unknown" in (await run("incident", "ack", "999", code=cli.EXIT_FAILED))[0]
    await run("silence", "add", "--site", "store-42", "--until", "2027-01-01T00:00:00Z", "--reason", "refit")
    shown = "2027-01-01T00:00:00Z"
    assert [row[-1] for row in await cells(run, "offline")] == [shown, shown]
    assert {row[0]: row[-1] for row in await cells(run, "get", "devices")}["d"] == ""
    assert [row[-1] for row in await cells(run, "get", "sites")] == [shown]
    assert [row[-2] for row in await cells(run, "get", "incidents")] == [shown, ""]
    assert f"silenced: {shown}" in await run("device", "a")


async def test_a_command_names_what_is_wrong(run: Run) -> None:
    [line] = await run("device", "nobody", code=cli.EXIT_FAILED)
    assert line == "nexhb: The daemon refused the request. Device not found: 'nobody'."
    assert "--last" in (await run("get", "events", "--last", "soon", code=cli.EXIT_USAGE))[0]


async def test_new_events_are_followed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events before the command began are not shown."""
    port = int(watched.nexhb.url.rpartition(":")[2])
    server = watched.nexhb.settings.server.model_copy(update={"port": port})
    settings = watched.nexhb.settings.model_copy(update={"server": server})
    monkeypatch.setattr(fleet, "FOLLOW_EVERY_S", 0.05)
    following = asyncio.create_task(fleet._follow(settings, {}, as_json=False))
    printed = ""

    async def wait_for(lines: int) -> None:
        nonlocal printed
        async with asyncio.timeout(SOON_S):
            while printed.count("\n") < lines:
                await asyncio.sleep(0.02)
                printed += capsys.readouterr().out

    await wait_for(1)  # the header is printed after the newest event was read
    await watched.minutes(1)
    await wait_for(3)
    following.cancel()
    assert {line.split("\t")[5] for line in printed.splitlines()[1:]} == {"online"}
