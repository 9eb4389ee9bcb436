"""The gradual rollout of the fast reads, as an operator performs it, while a fleet sends and operators read."""

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

from nexhb.config import IngestSettings, ReadsSettings
from nexhb.postgres.connections import Database
from nexhb.reading import flags
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon
from tests.support import forks

POSTING, SILENT, READERS = 12, 10, 6
LISTS = ("/v1/devices/offline", "/v1/devices/unity-down")
COMPARISONS = 12  # number of comparisons to wait for in each step
SWITCHED_OFF_WITHIN_S = 1.0  # after this time, no daemon may begin another fast read

pytestmark = pytest.mark.usefixtures("machine_time")  # the commands use the machine's clock


class Read(NamedTuple):
    """A read of a list or a device."""

    daemon: int
    started: float
    source: str


@dataclass
class Load:
    """A fleet that sends to two daemons and operators that read from them, with the responses they receive."""

    daemons: list[Nexhb]
    statuses: Counter[str] = field(default_factory=Counter)
    reads: list[Read] = field(default_factory=list)
    _response_received: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, agents: list[Agent], silent: list[str]) -> AsyncIterator[None]:
        """Run the load during the block, and raise its errors."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._post(number, agent)) for number, agent in enumerate(agents)]
            tasks += [group.create_task(self._read(number, silent)) for number in range(READERS)]
            yield
            for task in tasks:
                task.cancel()

    async def _post(self, number: int, agent: Agent) -> None:
        """Send heartbeats. Every other device replays a queue from two hours ago, which keeps changing its status."""
        age = timedelta(hours=2 * (number % 2))
        start = self.daemons[0].clock() - age
        for beat in itertools.count():
            made = start + timedelta(seconds=7 * beat) if age else self.daemons[0].clock()
            answer = await agent.send(made, unity_process_running=beat % 3 > 0, battery={"pct": float(beat % 101)})
            self.statuses[f"post {answer.status}"] += 1

    async def _read(self, number: int, silent: list[str]) -> None:
        """Read lists, and a single device every third time."""
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
        self._response_received.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is checked after each read."""
        async with asyncio.timeout(60):
            while not condition():
                self._response_received.clear()
                await self._response_received.wait()

    async def more_reads(self, count: int, daemon: int | None = None) -> list[Read]:
        """Wait for reads that start from now on, from one daemon or both, and return them."""
        now = asyncio.get_running_loop().time()

        def later_reads() -> list[Read]:
            return [read for read in self.reads if read.started >= now and daemon in (None, read.daemon)]

        await self.until(lambda: len(later_reads()) >= count)
        return later_reads()


@dataclass
class Operator:
    """An operator who uses the command line."""

    database: Database
    folder: Path

    async def nexhb(self, *arguments: str) -> dict[str, Any]:
        """Run a command with --json and return its output."""
        env = {"DATABASE_URL": self.database.dsn, "NEXHB_DATA_DIR": str(self.folder), "PATH": "/usr/bin"}
        done = await asyncio.to_thread(forks.run, "nexhb", [*arguments, "--json"], env=env, timeout=SOON_S)
        assert done.returncode == 0, done.stderr
        shown: dict[str, Any] = orjson.loads(done.stdout)
        return shown

    async def rollout(self, load: Load, *changes: str) -> None:
        """Change flags; wait until they are in force in both daemons and a few comparisons were made with them."""
        shown = await self.nexhb("flags", "set", *changes)
        expected = {name: shown[name] for name in flags.NAMES}
        async with asyncio.timeout(SOON_S):
            for nexhb in load.daemons:
                while await nexhb.get("/ops/flags") != expected:
                    pass
        before = await self.comparisons(load)
        async with asyncio.timeout(60):
            while await self.comparisons(load) < before + COMPARISONS:
                await load.more_reads(1)

    async def comparisons(self, load: Load) -> int:
        """Return how many comparisons were made so far."""
        return len(await load.daemons[0].rows("SELECT FROM perf_diff_comparisons"))


@pytest.fixture
async def daemons(start_daemon: StartDaemon) -> list[Nexhb]:
    """Two daemons, as after a move from NexMDM: reads come from the history."""
    often = IngestSettings(device_per_minute=1_000_000, device_burst=1_000_000)
    reads = ReadsSettings(from_last_status=False, perf_diff_percent=100)
    return [await start_daemon(ingest=often, reads=reads) for _ in range(2)]


@pytest.fixture
def operator(database: Database, tmp_path: Path) -> Operator:
    """An operator of these daemons."""
    return Operator(database, tmp_path)


async def imported_fleet(daemons: list[Nexhb], now: datetime) -> tuple[list[Agent], list[str]]:
    """Create a fleet with an imported history but no last status; return the devices that send and the silent ones."""
    agents = [await daemons[number % 2].agent(f"posting-{number}") for number in range(POSTING)]
    silent = [await daemons[0].agent(f"silent-{number}") for number in range(SILENT)]
    for number, agent in enumerate(silent):
        made = now - timedelta(minutes=30) - number * timedelta(hours=14)
        assert (await agent.send(made, unity_process_running=number % 2 == 0)).status == 200
    await daemons[0].rows("DELETE FROM device_last_status")
    return agents, [agent.device_id for agent in silent]


async def test_a_rollout_in_steps_and_its_reversal_in_a_second_cause_no_errors(
    daemons: list[Nexhb], operator: Operator, now: datetime
) -> None:
    agents, silent = await imported_fleet(daemons, now)
    load = Load(daemons)
    async with load.running(agents, silent):
        assert {read.source for read in await load.more_reads(20)} == {"legacy"}
        assert (await operator.nexhb("backfill", "--days", "7"))["status"] == "completed"

        await operator.rollout(load, "read_from_last_status=on", "rollout_percent=10", "perf_diff=on")
        await load.until(lambda: "last_status" in {read.source for read in load.reads})
        tenth = Counter(read.source for read in await load.more_reads(100))
        assert tenth["last_status"] < tenth["legacy"]

        await operator.rollout(load, "rollout_percent=50")
        half = Counter(read.source for read in await load.more_reads(100))
        assert min(half["last_status"], half["legacy"]) > 15

        await operator.rollout(load, "rollout_percent=100")
        assert {read.source for read in await load.more_reads(50)} == {"last_status"}

        delays_s = [await switch_off_and_on(load) for _ in range(3)]
        assert min(delays_s) < SWITCHED_OFF_WITHIN_S, delays_s

        await operator.rollout(load, "rollout_percent=100", "read_from_last_status=on")
    assert set(load.statuses) == {"post 200", "read 200"}
    report = await operator.nexhb("perf-diff", "report")
    assert report["last_mismatches"] == []
    assert {row["query"] for row in report["queries"]} == {"device", "offline", "unity_down"}
    assert sum(row["comparisons"] for row in report["queries"]) >= 4 * COMPARISONS


async def switch_off_and_on(load: Load) -> float:
    """Turn the fast reads off at one daemon, and on again. Return the seconds until the other daemon began its last
    fast read."""
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
    # This daemon reads from the history as soon as it has responded to the change of the flag.
    assert {read.source for read in await load.more_reads(10, daemon=0)} == {"legacy"}
    await load.until(lambda: [read.source for read in load.reads if read.daemon == 1][-10:] == ["legacy"] * 10)
    fast = [read.started for read in load.reads if read.source == "last_status" and read.started >= began]
    await switch(True)
    await load.until(lambda: {read.source for read in load.reads[-10:]} == {"last_status"})
    return max(fast, default=began) - began


async def test_wrong_fast_reads_are_detected_and_turned_off_while_reads_continue(
    daemons: list[Nexhb], operator: Operator, now: datetime
) -> None:
    agents, silent = await imported_fleet(daemons, now)
    load = Load(daemons)
    async with load.running(agents, silent):
        await operator.nexhb("backfill", "--days", "7")
        await operator.rollout(load, "read_from_last_status=on", "rollout_percent=100", "perf_diff=on")
        assert {read.source for read in await load.more_reads(20)} == {"last_status"}
        assert await daemons[0].rows("SELECT FROM perf_diff_comparisons WHERE rows_differ > 0") == []

        await daemons[0].rows("UPDATE device_last_status SET battery_pct = 1 WHERE device_id = $1", silent[3])
        await load.until(lambda: {read.source for read in load.reads[-20:]} == {"legacy"})
    assert set(load.statuses) == {"post 200", "read 200"}
    flags = await operator.nexhb("flags")
    assert flags["read_from_last_status"] is False
    assert (flags["changes"][0]["flag"], flags["changes"][0]["by"]) == ("read_from_last_status", "perf_diff")
    wrong = await daemons[0].rows("SELECT DISTINCT examples FROM perf_diff_comparisons WHERE rows_differ > 0")
    assert [row["examples"] for row in wrong] == [[silent[3]]]
