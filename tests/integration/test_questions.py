"""Each command and each call of docs/questions.md, run against a fleet in which everything happened that people ask
about, returns the kiosk or the number that answers the question."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from nexhb.config import NotifySettings
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon
from tests.support import forks
from tests.support.receiver import receiving
from tests.support.watching import Watched

PAGE = Path(__file__).parents[2] / "docs" / "questions.md"
pytestmark = pytest.mark.usefixtures("machine_time")
_ROW = re.compile(r"\| (?P<question>.+?) \| (?P<command>.+?) \| (?P<call>.+?) \|")
_CODE = re.compile(r"`(.+?)`")
OLD_VERSION = {"io.unitynodes.unityapp": {"installed": True, "version_name": "2.0.9", "version_code": 1}}


class Row(NamedTuple):
    """A line of the page's table."""

    question: str
    command: str
    call: str


class Answer(NamedTuple):
    """What the output of the command and the response to the call have to contain."""

    command: str
    call: str


def rows() -> dict[str, Row]:
    """Return the lines of the table by question; the command and the call are the first code of their cells."""
    found = [Row(*match.groups()) for match in map(_ROW.fullmatch, PAGE.read_text().splitlines()) if match]
    return {
        row.question: Row(row.question, *(_CODE.findall(cell)[0] for cell in row[1:]))
        for row in found
        if "`" in row.command
    }


def same(text: str) -> Answer:
    """Expect the same text of both."""
    return Answer(text, text)


ANSWERS = {
    "Is nexhb well?": Answer("database", "ready"),
    "How many kiosks are down?": Answer("offline: 3", '"offline":3'),
    "Which, and since when?": same("till-1"),
    "Is it the battery?": same("old-battery"),
    "Is it the whole store?": Answer("offline\tsite", '"scope":"site"'),
    "Did the app crash?": same("crashed"),
    "Is it an outage of nexhb?": Answer("unknown: 0", '"unknown":0'),
    "What changed in the last hour?": same("crashed"),
    "Which have an old version?": same("old-version"),
    "Which batteries are dying?": same("old-battery"),
    "Which kiosks flap?": same("flaps"),
    "Whose clock is wrong?": same("wrong-clock"),
    "Who floods?": same("floods"),
    "What was a site's uptime last week?": Answer("store-42\t", '"site":"store-42","share":'),
    "Can I have it as CSV?": Answer("old-version\t", "old-version,"),
    "Can Grafana show it?": Answer("offline\tsite", "offline,site"),
    "Can nexhb notify me?": Answer("delivered", ""),
    "Can I suppress the messages about a store until eight?": Answer("site store-42", ""),
}


@pytest.fixture
async def fleet(start_daemon: StartDaemon, conn: Connection, now: datetime) -> AsyncIterator[Nexhb]:
    """A daemon with a store that is offline, and kiosks that are named after what is wrong with them."""
    began = now - timedelta(minutes=20)  # commands read the machine's clock: all of it is over before the present
    async with receiving() as receiver:
        notify = NotifySettings(routes=[receiver.route()])
        watched = await Watched.start(start_daemon, conn, began, notify=notify)
        await watched.add("till-1", "till-2", "till-3", site="store-42")
        await watched.add("old-battery", "wrong-clock", "crashed", "flaps", "floods", "old-version")
        await watched.minutes(2)
        watched.kiosks["old-battery"].changes = {"battery": {"pct": 3.0, "charging": False}}
        watched.kiosks["crashed"].changes = {"unity_process_running": False}
        watched.kiosks["old-version"].changes = {"app_versions": OLD_VERSION}
        for minute in range(12):
            watched.kiosks["flaps"].changes = {"unity_process_running": minute % 2 == 0}
            await watched.minutes(1, silent=["till-1", "till-2", "till-3", "wrong-clock"])
            wrong = {**watched.kiosks["wrong-clock"].body(watched.now), "timestamp_utc": "2020-01-01T00:00:00Z"}
            assert (await watched.kiosks["wrong-clock"].agent.send(watched.now, **wrong)).status == 200
        await watched.round()
        await conn.execute(
            """INSERT INTO device_refusals (device_no, refused_at, status, reason)
            SELECT device_no, $1, 429, 'rate limit' FROM devices WHERE device_id = 'floods'""",
            watched.now,
        )
        yield watched.nexhb


def test_every_question_has_an_answer_here() -> None:
    assert list(ANSWERS) == list(rows())


async def test_the_command_and_the_call_answer_the_question(fleet: Nexhb, tmp_path: Path) -> None:
    env = {
        "NEXHB_SERVER__PORT": fleet.url.rpartition(":")[2], "ADMIN_KEY": ADMIN_KEY, "NEXHB_DATA_DIR": str(tmp_path),
        "NEXHB_DATABASE__URL": fleet.database.dsn, "PATH": "",
    }  # fmt: skip
    for question, row in rows().items():
        words = row.command.replace("ROUTE", "on-call").split()
        done = await asyncio.to_thread(forks.run, words[0], words[1:], env=env, timeout=50)
        # Of an installation whose jobs have never run, doctor has something to report.
        assert done.returncode == 0 or row.command == "nexhb doctor", f"{question} {row.command}: {done.stderr}"
        assert ANSWERS[question].command in done.stdout, f"{question} {row.command}: {done.stdout}{done.stderr}"
        method, path = row.call.split()
        if method == "GET" and path != "/v1/stream":
            at = f"{fleet.clock() - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
            url = fleet.url + re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", at, path)
            async with fleet.http.get(url, headers={"x-admin": ADMIN_KEY}) as response:
                text = await response.text()
                assert response.status == 200, f"{question} {row.call}: {text}"
            assert ANSWERS[question].call in text, f"{question} {row.call}: {text}"
