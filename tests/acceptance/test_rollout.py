"""The progressive rollout of the fast reads, as an operator goes about it, while a fleet posts and operators read."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from nexhb import flags
from nexhb.config import Ingest, Reads
from nexhb.db import Database
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon

POSTING, SILENT, READERS = 12, 10, 6
LISTS = ("/v1/devices/offline", "/v1/devices/unity-down")
COMPARED = 12  # comparisons at each step
KILLED_WITHIN_S = 1.0


class Read(NamedTuple):
    """One list that somebody read."""

    daemon: int
    started: float
    source: str


@dataclass
class Load:
    """A fleet that posts and operators that read, from two daemons; what they hear."""

    daemons: list[Nexhb]
    statuses: Counter[str] = field(default_factory=Counter)
    reads: list[Read] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, agents: list[Agent], silent: list[str]) -> AsyncIterator[None]:
        """For the block. What goes wrong in it is raised here."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._post(number, agent)) for number, agent in enumerate(agents)]
            tasks += [group.create_task(self._read(number, silent)) for number in range(READERS)]
            yield
            for task in tasks:
                task.cancel()

    async def _post(self, number: int, agent: Agent) -> None:
        """Every other device is two hours behind, replaying its queue: its last status moves with each heartbeat."""
        behind = timedelta(hours=2 * (number % 2))
        start = self.daemons[0].clock() - behind
        for beat in itertools.count():
            made = start + timedelta(seconds=7 * beat) if behind else self.daemons[0].clock()
            answer = await agent.send(made, unity_process_running=beat % 3 > 0, battery={"pct": float(beat % 101)})
            self.statuses[f"post {answer.status}"] += 1

    async def _read(self, number: int, silent: list[str]) -> None:
        """Lists, and every third time a device."""
        for turn in itertools.count(number):
            at = turn % len(self.daemons)
            path = f"/v1/devices/{silent[turn % len(silent)]}" if turn % 3 == 0 else LISTS[turn % 2]
            await self._get(at, path)

    async def _get(self, at: int, path: str) -> None:
        nexhb, started = self.daemons[at], asyncio.get_running_loop().time()
        async with nexhb.http.get(nexhb.url + path, headers={"x-admin": ADMIN_KEY}) as response:
            body = orjson.loads(await response.read())
        self.statuses[f"read {response.status}"] += 1
        if "source" in body:
            self.reads.append(Read(at, started, body["source"]))
        self._news.set()

    async def until(self, so: Callable[[], bool]) -> None:
        """Wait until it is so; looked at with each read."""
        async with asyncio.timeout(60):
            while not so():
                self._news.clear()
                await self._news.wait()

    async def more_reads(self, wanted: int, daemon: int | None = None) -> list[Read]:
        """The next reads that are started from now on, of one daemon or of both."""
        now = asyncio.get_running_loop().time()

        def found() -> list[Read]:
            return [one for one in self.reads if one.started >= now and daemon in (None, one.daemon)]

        await self.until(lambda: len(found()) >= wanted)
        return found()


@dataclass
class Operator:
    """Somebody at the command line."""

    database: Database
    folder: Path

    async def nexhb(self, *arguments: str) -> dict[str, Any]:
        """A command, with --json."""
        process = await asyncio.create_subprocess_exec(
            ".venv/bin/python", "-m", "nexhb", *arguments, "--json",
            env={"DATABASE_URL": self.database.dsn, "NEXHB_DATA_DIR": str(self.folder), "PATH": "/usr/bin"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, errors.decode()
        found: dict[str, Any] = orjson.loads(output)
        return found

    async def rollout(self, load: Load, *changes: str) -> None:
        """Switch flags, and wait until both daemons have them and a few comparisons were made under them."""
        wanted = await self.nexhb("flags", "set", *changes)
        wanted = {name: wanted[name] for name in flags.NAMES}
        async with asyncio.timeout(SOON_S):
            for nexhb in load.daemons:
                while await nexhb.get("/ops/flags") != wanted:
                    pass
        before = await self.comparisons(load)
        async with asyncio.timeout(60):
            while await self.comparisons(load) < before + COMPARED:
                await load.more_reads(1)

    async def comparisons(self, load: Load) -> int:
        """How many were made so far."""
        return len(await load.daemons[0].rows("SELECT FROM perf_diff_comparisons"))


@pytest.fixture
async def daemons(start_daemon: StartDaemon) -> list[Nexhb]:
    """Two of them, as they are behind a move from the old system: reads come from the history."""
    often = Ingest(device_per_minute=1_000_000, device_burst=1_000_000)
    reads = Reads(from_last_status=False, perf_diff_percent=100)
    return [await start_daemon(ingest=often, reads=reads) for _ in range(2)]


@pytest.fixture
def operator(database: Database, tmp_path: Path) -> Operator:
    """Beside them."""
    return Operator(database, tmp_path)


async def moved(daemons: list[Nexhb], now: datetime) -> tuple[list[Agent], list[str]]:
    """A fleet whose history was moved here and whose last status was not: who posts, and who is silent."""
    agents = [await daemons[number % 2].agent(f"posting-{number}") for number in range(POSTING)]
    silent = [await daemons[0].agent(f"silent-{number}") for number in range(SILENT)]
    for number, agent in enumerate(silent):
        made = now - timedelta(minutes=30) - number * timedelta(hours=14)
        assert (await agent.send(made, unity_process_running=number % 2 == 0)).status == 200
    await daemons[0].rows("DELETE FROM device_last_status")
    return agents, [agent.device_id for agent in silent]


async def test_backfill_a_tenth_a_half_everybody_and_back_in_a_second_without_an_error(
    daemons: list[Nexhb], operator: Operator, now: datetime
) -> None:
    agents, silent = await moved(daemons, now)
    load = Load(daemons)
    async with load.running(agents, silent):
        assert {one.source for one in await load.more_reads(20)} == {"legacy"}
        assert (await operator.nexhb("backfill", "--days", "7"))["status"] == "completed"

        await operator.rollout(load, "read_from_last_status=on", "rollout_percent=10", "perf_diff=on")
        await load.until(lambda: "last_status" in {one.source for one in load.reads})
        tenth = Counter(one.source for one in await load.more_reads(100))
        assert tenth["last_status"] < tenth["legacy"]

        await operator.rollout(load, "rollout_percent=50")
        half = Counter(one.source for one in await load.more_reads(100))
        assert min(half["last_status"], half["legacy"]) > 15

        await operator.rollout(load, "rollout_percent=100")
        assert {one.source for one in await load.more_reads(50)} == {"last_status"}

        took_s = [await killed(load) for _ in range(3)]
        assert min(took_s) < KILLED_WITHIN_S, took_s

        await operator.rollout(load, "rollout_percent=100", "read_from_last_status=on")
    assert set(load.statuses) == {"post 200", "read 200"}
    report = await operator.nexhb("perf-diff", "report")
    assert report["last_mismatches"] == []
    assert {row["query"] for row in report["queries"]} == {"device", "offline", "unity_down"}
    assert sum(row["comparisons"] for row in report["queries"]) >= 4 * COMPARED


async def killed(load: Load) -> float:
    """Pull the kill switch at one daemon: after how many seconds the last fast read began at the other."""
    here, _ = load.daemons
    loop = asyncio.get_running_loop()

    async def switch(on: bool) -> float:
        began = loop.time()
        async with here.http.put(
            f"{here.url}/ops/flags", json={"read_from_last_status": on}, headers={"x-admin": ADMIN_KEY}
        ) as response:
            assert (await response.json())["read_from_last_status"] is on
        return began

    began = await switch(False)
    assert {one.source for one in await load.more_reads(10, daemon=0)} == {"legacy"}  # here, once it is answered
    await load.until(lambda: [one.source for one in load.reads if one.daemon == 1][-10:] == ["legacy"] * 10)
    fast = [one.started for one in load.reads if one.source == "last_status" and one.started >= began]
    await switch(True)
    await load.until(lambda: {one.source for one in load.reads[-10:]} == {"last_status"})
    return max(fast, default=began) - began


async def test_a_wrong_fast_read_is_found_and_turned_off_while_everybody_reads_on(
    daemons: list[Nexhb], operator: Operator, now: datetime
) -> None:
    agents, silent = await moved(daemons, now)
    load = Load(daemons)
    async with load.running(agents, silent):
        await operator.nexhb("backfill", "--days", "7")
        await operator.rollout(load, "read_from_last_status=on", "rollout_percent=100", "perf_diff=on")
        assert {one.source for one in await load.more_reads(20)} == {"last_status"}
        assert await daemons[0].rows("SELECT FROM perf_diff_comparisons WHERE rows_differ > 0") == []

        await daemons[0].rows("UPDATE device_last_status SET battery_pct = 1 WHERE device_id = $1", silent[3])
        await load.until(lambda: {one.source for one in load.reads[-20:]} == {"legacy"})
    assert set(load.statuses) == {"post 200", "read 200"}
    flags = await operator.nexhb("flags")
    assert flags["read_from_last_status"] is False
    assert (flags["changes"][0]["flag"], flags["changes"][0]["by"]) == ("read_from_last_status", "perf_diff")
    wrong = await daemons[0].rows("SELECT DISTINCT examples FROM perf_diff_comparisons WHERE rows_differ > 0")
    assert [row["examples"] for row in wrong] == [[silent[3]]]
