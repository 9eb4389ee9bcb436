"""A change of a flag takes effect at once in every daemon, survives restarts, and is recorded."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from nexhb import log
from nexhb.config import ReadsSettings, Settings
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.identity import DatabaseTracker
from nexhb.reading import flags
from nexhb.reading.flags import Flags, FlagStore
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon
from tests.proxy import Proxy
from tests.support import forks

OFF = {"read_from_last_status": False}


async def put(nexhb: Nexhb, changes: object, status: int = 200) -> Any:
    """PUT /ops/flags; return the body of the response."""
    async with nexhb.http.put(f"{nexhb.url}/ops/flags", json=changes, headers={"x-admin": ADMIN_KEY}) as response:
        body = orjson.loads(await response.read())
        assert response.status == status, body
        return body


async def becomes(nexhb: Nexhb, **expected: object) -> None:
    """Wait until the flags have these values."""
    found: dict[str, Any] = {}
    try:
        async with asyncio.timeout(SOON_S):
            while not expected.items() <= found.items():
                found = await nexhb.get("/ops/flags")
    except TimeoutError:
        pytest.fail(f"after {SOON_S} s the flags are still {found}")


async def history(nexhb: Nexhb) -> list[tuple[Any, ...]]:
    """Return the recorded changes, in order."""
    rows = await nexhb.rows(
        "SELECT flag, value_from, value_to, changed_by FROM feature_flag_changes ORDER BY change_no"
    )
    return [tuple(row) for row in rows]


@pytest.fixture
async def both(start_daemon: StartDaemon) -> list[Nexhb]:
    """Start two daemons on one database."""
    return [await start_daemon(), await start_daemon()]


# ---- initial values -------------------------------------------------------------------------------------------------


async def test_the_configuration_gives_the_initial_value_and_later_the_database_counts(
    start_daemon: StartDaemon,
) -> None:
    first = await start_daemon(reads=ReadsSettings(from_last_status=False, rollout_percent=10, perf_diff=True))
    configured = {"read_from_last_status": False, "rollout_percent": 10, "perf_diff": True}
    assert await first.get("/ops/flags") == configured
    assert await history(first) == [
        (flag, None, orjson.dumps(value).decode(), "config") for flag, value in configured.items()
    ]
    later = await start_daemon(reads=ReadsSettings())
    assert await later.get("/ops/flags") == configured
    assert len(await history(first)) == 3


async def test_a_change_outlives_the_daemon(start_daemon: StartDaemon) -> None:
    await put(await start_daemon(), {"rollout_percent": 50})
    assert (await (await start_daemon()).get("/ops/flags"))["rollout_percent"] == 50


# ---- at once, everywhere --------------------------------------------------------------------------------------------


async def test_a_change_is_in_force_here_with_the_response_and_everywhere_at_once(both: list[Nexhb]) -> None:
    here, there = both
    for percent in (10, 50, 0, 100):
        answered = await put(here, {"rollout_percent": percent, "changed_by": "Ada"})
        assert answered == {"read_from_last_status": True, "rollout_percent": percent, "perf_diff": False}
        assert await here.get("/ops/flags") == answered
        await becomes(there, rollout_percent=percent)
    assert (await history(here))[-1] == ("rollout_percent", "0", "100", "Ada")


async def test_a_change_by_hand_is_in_force_and_in_the_history(both: list[Nexhb]) -> None:
    await both[0].rows("UPDATE feature_flags SET value = 'false', changed_by = 'psql' WHERE flag = $1", *OFF)
    for nexhb in both:
        await becomes(nexhb, **OFF)
    assert (await history(both[0]))[-1] == ("read_from_last_status", "true", "false", "psql")


async def test_a_lost_notification_delays_a_change_until_the_next_poll(nexhb: Nexhb, conn: Connection) -> None:
    await conn.execute("ALTER TABLE feature_flags DISABLE TRIGGER feature_flags_changed")
    await conn.execute("UPDATE feature_flags SET value = 'false' WHERE flag = $1", *OFF)
    await becomes(nexhb, **OFF)


async def test_an_invalid_value_in_the_database_is_ignored(nexhb: Nexhb, conn: Connection) -> None:
    await conn.execute("""UPDATE feature_flags SET value = '"maybe"' WHERE flag = 'read_from_last_status'""")
    await conn.execute("UPDATE feature_flags SET value = '7' WHERE flag = 'rollout_percent'")
    await becomes(nexhb, rollout_percent=7, read_from_last_status=True)


async def test_without_the_database_flags_keep_their_values_and_later_changes_are_followed(
    start_daemon: StartDaemon, database: Database, conn: Connection
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(url=proxy.dsn)
        await put(nexhb, {"rollout_percent": 10})
        proxy.make_unreachable()
        await conn.execute("UPDATE feature_flags SET value = 'false' WHERE flag = $1", *OFF)
        for _ in range(3):
            assert (await nexhb.get("/ops/flags"))["rollout_percent"] == 10
        await put(nexhb, {"rollout_percent": 20}, 503)
        assert not nexhb.running.tasks.failed.done()
        proxy.make_reachable()
        await becomes(nexhb, rollout_percent=10, **OFF)
        assert not nexhb.running.tasks.failed.done()


async def test_an_error_in_the_task_that_follows_the_flags_stops_the_daemon(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(_store: FlagStore) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(FlagStore, "_follow", dies)
    nexhb = await start_daemon()
    assert str(await asyncio.wait_for(nexhb.running.tasks.failed, SOON_S)) == "a defect"


async def test_values_read_before_a_change_do_not_replace_it(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, if a flag was changed after a poll had read the old values and before it stored them in memory, the
    poll overwrote the change; the next poll corrected it."""
    store, plain = FlagStore(database, Flags(), lambda: now), flags.read
    await store.load()
    has_read, goes_on = asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any) -> Flags:
        found = await plain(*args)
        if not has_read.is_set():
            has_read.set()
            await goes_on.wait()
        return found

    monkeypatch.setattr(flags, "read", slowly)
    polling = asyncio.create_task(store._read(conn))
    await has_read.wait()
    changing = asyncio.create_task(store.change({"rollout_percent": 50}, "Ada"))
    async with asyncio.timeout(SOON_S):
        while not (changing.done() or store._reading._waiters):
            await asyncio.sleep(0.01)
    goes_on.set()
    await asyncio.gather(polling, changing)
    assert store.current.rollout_percent == 50


FOLLOWER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb flags' AND datname = current_database()"


@asynccontextmanager
async def followed(store: FlagStore, conn: Connection) -> AsyncIterator[int]:
    """Make the store follow the flags; yield the pid of the backend on which it listens."""
    following = asyncio.create_task(store.run())
    try:
        async with asyncio.timeout(SOON_S):
            while store._conn is None or (pid := await conn.fetchval(FOLLOWER)) is None:
                await asyncio.sleep(0.01)
        yield int(pid)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_another_database_has_its_own_flags_and_changes(
    database: Database, conn: Connection, now: datetime
) -> None:
    """A restore into the same database closes no connection, so the daemon does not reconnect. Formerly, it did not
    store the flags' initial values in the restored database, and did not log changes made there, because their numbers
    start again from 1."""
    tracker = DatabaseTracker()
    store = FlagStore(database, Flags(rollout_percent=30), lambda: now, tracker)
    await store.load()
    await flags.change(conn, {"perf_diff": True}, "Ada", now, Flags())
    async with followed(store, conn):
        async with asyncio.timeout(SOON_S):
            while store._last_change_no != 4:
                await asyncio.sleep(0.01)
        await conn.execute("TRUNCATE feature_flags, feature_flag_changes RESTART IDENTITY")
        tracker.epoch += 1
        for forget in tracker._callbacks:
            forget()
        async with asyncio.timeout(SOON_S):
            while await conn.fetchval("SELECT count(*) FROM feature_flags") < 3 or store._last_change_no != 3:
                await asyncio.sleep(0.01)
        log.setup("info", lines := io.StringIO())
        await flags.change(conn, {"rollout_percent": 40}, "Ada", now, Flags())
        async with asyncio.timeout(SOON_S):
            while "flags.changed" not in lines.getvalue():
                await asyncio.sleep(0.01)
    assert (store.current, store._last_change_no) == (Flags(rollout_percent=40), 4)


async def test_a_follower_whose_session_stalls_continues_on_a_new_one(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "RESPONSE_TIMEOUT_S", 1.0)
    store = FlagStore(database, Flags(), lambda: now)
    await store.load()
    async with followed(store, conn) as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            await flags.change(conn, {"rollout_percent": 60}, "Ada", now, Flags())
            async with asyncio.timeout(SOON_S - 10):  # the default timeout of a statement is a minute
                while store.current.rollout_percent != 60:
                    await asyncio.sleep(0.01)
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_concurrent_changes_leave_one_consistent_history(database: Database, now: datetime) -> None:
    async def switch(percent: int) -> None:
        async with database.connected(application="test") as conn:
            await flags.change(conn, {"rollout_percent": percent}, f"by {percent}", now, Flags())

    await asyncio.gather(*(switch(percent) for percent in range(10)))
    async with database.connected(application="test") as conn:
        changes = [one for one in await flags.last_changes(conn, 100) if one["flag"] == "rollout_percent"]
        assert (await flags.read(conn, Flags())).rollout_percent == changes[0]["to"]
    assert len(changes) == 11
    assert all(older["to"] == newer["from"] for newer, older in itertools.pairwise(changes))
    assert all(one["by"] == f"by {one['to']}" for one in changes[:-1])


# ---- events and metrics ---------------------------------------------------------------------------------------------


async def test_each_change_is_one_event_and_a_gauge(nexhb: Nexhb) -> None:
    log.setup("info", lines := io.StringIO())
    await put(nexhb, {"rollout_percent": 10, "perf_diff": True, "changed_by": "Ada"})
    await put(nexhb, {"rollout_percent": 10})  # no change
    await put(nexhb, {"perf_diff": False})
    async with asyncio.timeout(SOON_S):
        while lines.getvalue().count("flags.changed") < 3:
            await nexhb.get("/ops/flags")
    found = [orjson.loads(line) for line in lines.getvalue().splitlines()]
    logged = [(e["flag"], e["from"], e["to"], e["by"]) for e in found if e["event"] == "flags.changed"]
    assert logged == [
        ("rollout_percent", 100, 10, "Ada"), ("perf_diff", False, True, "Ada"), ("perf_diff", True, False, "127.0.0.1"),
    ]  # fmt: skip
    async with nexhb.http.get(f"{nexhb.url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
        gauges = dict(re.findall(r'^nexhb_flag\{flag="(\w+)"\} (\S+)$', await response.text(), re.MULTILINE))
    assert gauges == {"read_from_last_status": "1.0", "rollout_percent": "10.0", "perf_diff": "0.0"}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"no_such_flag": True}, "no_such_flag"), ({"perf_diff": 1}, "perf_diff"), ({"perf_diff": None}, "perf_diff"),
        ({"perf_diff": "on"}, "perf_diff"), ({"rollout_percent": 101}, "rollout_percent"),
        ({"rollout_percent": -1}, "rollout_percent"), ({"rollout_percent": 1.5}, "rollout_percent"),
        ({"rollout_percent": True}, "rollout_percent"), ({"rollout_percent": "10"}, "rollout_percent"),
        ({"rollout_percent": 10, "changed_by": "a\nb"}, "changed_by"), ({"changed_by": 7}, "changed_by"),
    ],
)  # fmt: skip
async def test_an_unknown_flag_or_an_invalid_value_is_named_and_nothing_changes(
    nexhb: Nexhb, changes: dict[str, object], path: str
) -> None:
    problem = await put(nexhb, {"read_from_last_status": False, **changes}, 422)
    assert [error["path"] for error in problem["errors"]] == [path]
    assert path in problem["detail"]
    assert (await nexhb.get("/ops/flags"))["read_from_last_status"] is True
    await put(nexhb, [], 422)
    assert (await put(nexhb, {"rollout_percent": 10.0}))["rollout_percent"] == 10


# ---- the command ----------------------------------------------------------------------------------------------------

Command = Callable[..., Any]


@pytest.fixture
def command(database: Database, tmp_path: Path) -> Command:
    """Return a function that runs `nexhb flags …` beside the test's daemons and returns its exit code and output."""

    async def run(*arguments: str) -> tuple[int, str]:
        env = {"DATABASE_URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "LOGNAME": "ada", "PATH": "/usr/bin"}
        done = await asyncio.to_thread(
            forks.run, "nexhb", ["flags", *arguments], env=env, stderr=subprocess.STDOUT, timeout=SOON_S
        )
        return done.returncode, done.stdout

    return run


async def test_the_command_shows_and_changes_flags(command: Command, both: list[Nexhb]) -> None:
    code, output = await command("set", "read_from_last_status=off", "rollout_percent=10")
    assert code == 0, output
    for nexhb in both:
        await becomes(nexhb, read_from_last_status=False, rollout_percent=10)
    code, output = await command("--json")
    found = orjson.loads(output)
    assert (found["read_from_last_status"], found["rollout_percent"], found["perf_diff"]) == (False, 10, False)
    assert (found["changes"][0]["flag"], found["changes"][0]["from"], found["changes"][0]["to"]) == (
        "rollout_percent", 100, 10,
    )  # fmt: skip
    assert found["changes"][0]["by"].startswith("ada@")
    code, output = await command()
    assert re.search(r"^read_from_last_status +off$", output, re.MULTILINE)
    assert "read_from_last_status: on → off, ada@" in output


@pytest.mark.parametrize("wrong", ["rollout_percent=101", "rollout_percent=on", "perf_diff=10", "perf_dif=on", "x"])
async def test_an_invalid_argument_is_wrong_usage_and_changes_nothing(
    command: Command, database: Database, wrong: str
) -> None:
    code, output = await command("set", "read_from_last_status=off", wrong)
    assert (code, wrong in output) == (2, True)
    async with database.connected(application="test") as conn:
        assert (await flags.read(conn, Flags())).read_from_last_status is True


def test_the_seeds_environment_variables_set_the_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READ_FROM_LAST_STATUS", "false")
    monkeypatch.setenv("PERF_DIFF_ENABLED", "true")
    assert flags.first_values(Settings().reads) == Flags(read_from_last_status=False, perf_diff=True)
