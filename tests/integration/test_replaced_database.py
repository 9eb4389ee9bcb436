"""The database of a running daemon is replaced by a copy under its name, a server behind a proxy, a lagging standby or
a restore. State from the previous database is dropped, and every acknowledged heartbeat is in the present database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from nexhb.config import ServerSettings
from nexhb.devices import registry
from nexhb.doctor import checks
from nexhb.doctor.check import CheckContext, CheckResult
from nexhb.errors import DatabaseUnavailable
from nexhb.postgres import identity
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S, Agent, Answer, Nexhb, StartDaemon, example
from tests.faults.cluster import Cluster, running
from tests.faults.guard import guarding
from tests.proxy import Proxy
from tests.standby import Standby, standby_of

WAITING = (
    "SELECT FROM pg_stat_activity WHERE application_name = 'nexhb writer' AND wait_event_type = 'Lock'"
    " AND datname = current_database()"
)


def named(network: str) -> dict[str, Any]:
    """Return the network section of a heartbeat."""
    return {"network": {"transport": "wifi", "ssid": network, "ip": "192.168.1.50"}}


class Swap:
    """An operator who copies and renames databases of the session's cluster."""

    def __init__(self, admin: asyncpg.Connection, database: Database) -> None:
        self._admin = admin
        self.name = str(database.address.database)
        self.copies: list[str] = []

    @asynccontextmanager
    async def _alone(self, *names: str) -> AsyncIterator[None]:
        for name in names:
            await self._admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        async with asyncio.timeout(SOON_S):
            while await self._admin.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ANY($1)", list(names)
            ):
                await asyncio.sleep(0.01)
        yield

    async def copy(self) -> str:
        """Copy the database as it is now; return the name of the copy."""
        copy = f"{self.name}_copy{len(self.copies)}"
        async with self._alone(self.name):
            await self._admin.execute(f"CREATE DATABASE {copy} TEMPLATE {self.name}")
        for name in (self.name, copy):
            await self._admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        self.copies.append(copy)
        return copy

    async def put_in_place(self, copy: str) -> str:
        """Give the copy the database's name; return the new name of the previous database."""
        before = f"{self.name}_before{len(self.copies)}"
        async with self._alone(self.name, copy):
            await self._admin.execute(f"ALTER DATABASE {self.name} RENAME TO {before}")
            await self._admin.execute(f"ALTER DATABASE {copy} RENAME TO {self.name}")
        for name in (self.name, before):
            await self._admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        self.copies.append(before)
        return before


@pytest.fixture
async def swap(cluster: str, database: Database) -> AsyncIterator[Swap]:
    """Provide a Swap for the test's database; drop the copies at the end."""
    admin = await asyncpg.connect(cluster)
    swap = Swap(admin, database)
    yield swap
    for name in swap.copies:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await admin.close()


async def becomes(expected: int, send: Callable[[], Awaitable[Answer]], never: int = 401) -> Answer:
    """Send until the response has this status, and return it; fail if an earlier response has the status `never`."""
    async with asyncio.timeout(SOON_S):
        while (answer := await send()).status != expected:
            assert answer.status != never, answer
            await asyncio.sleep(0.02)
    return answer


async def is_held(agent: Agent, now: datetime) -> None:
    """Send until a response names the older copy of the database; fail if a response reports that the token is
    unknown."""
    while "older copy" not in (await becomes(503, lambda: agent.send(now))).body["detail"]:
        await asyncio.sleep(0.02)


async def stored(nexhb: Nexhb) -> list[tuple[str | None, str | None, datetime]]:
    """Return the history as (device_id, ssid, ts)."""
    rows = await nexhb.rows("SELECT device_id, ssid, ts FROM heartbeat_history ORDER BY ts, device_id")
    return [tuple(row) for row in rows]


async def test_an_older_copy_under_the_databases_name_is_detected_and_can_be_accepted(
    start_daemon: StartDaemon, swap: Swap, now: datetime, tmp_path: Path
) -> None:
    """Formerly, a heartbeat with a new network was acknowledged as a duplicate but not stored, and its label's number
    went to another network; a device added after the copy received 200, and its number went to another device."""
    nexhb = await start_daemon()
    agent = await nexhb.agent("kiosk-1")
    first = now - timedelta(minutes=5)
    assert (await agent.send(first, **named("Before"))).status == 200
    copy = await swap.copy()
    lost = now - timedelta(minutes=4)
    await becomes(200, lambda: agent.send(lost, **named("Lost")))
    late = await nexhb.agent("kiosk-2")
    assert (await late.send(lost, **named("Lost"))).status == 200
    await swap.put_in_place(copy)
    again = await becomes(200, lambda: agent.send(lost, **named("Lost")))
    assert again.body["deduplicated"] is False
    # A device that the copy lacks keeps its heartbeats and its token, and nothing is stored under its number.
    unknown = await late.send(now, **named("Lost"))
    assert (unknown.status, "older copy" in unknown.body["detail"]) == (503, True)
    stranger = await nexhb.agent("kiosk-3")
    await becomes(200, lambda: stranger.send(now, **named("Another")))
    assert await stored(nexhb) == [
        ("kiosk-1", "Before", first), ("kiosk-1", "Lost", lost), ("kiosk-3", "Another", now),
    ]  # fmt: skip
    assert (await nexhb.get("/readyz"))["remarks"]
    assert await nexhb.metric("nexhb_database_older") == 1
    await accepted(nexhb, late, now, tmp_path)


async def of_doctor(conn: Connection, nexhb: Nexhb) -> CheckResult:
    """Return doctor's result for the check "database copy"."""
    return await checks.CHECKS["database copy"](CheckContext(conn, nexhb.settings, nexhb.clock()))


async def accepted(nexhb: Nexhb, late: Agent, now: datetime, data_dir: Path) -> None:
    """Check that doctor names the command with which the operator accepts the copy; run that command."""
    conn = await nexhb.database.connect(application="test operator")
    try:
        async with asyncio.timeout(SOON_S):
            while (line := await of_doctor(conn, nexhb)).passed:  # the daemon records the copy a moment later
                await asyncio.sleep(0.02)
        assert line.remedy == "nexhb database accept"
        assert len(await identity.accept(conn, data_dir)) == 1
        await becomes(401, lambda: late.send(now), never=200)
        assert "remarks" not in await nexhb.get("/readyz")
        assert await nexhb.metric("nexhb_database_older") == 0
        assert (await of_doctor(conn, nexhb)).passed
    finally:
        await conn.close()


async def test_heartbeats_in_progress_are_not_written_under_a_device_number_of_the_previous_database(
    start_daemon: StartDaemon, swap: Swap, now: datetime
) -> None:
    """A heartbeat waits in the writer, and the body of a queue is incomplete. The number of their device is that which
    the new database gives to its next device."""
    nexhb = await start_daemon(server=ServerSettings(port=0, shutdown_timeout_seconds=2, body_timeout_seconds=60))
    copy = await swap.copy()
    late = await nexhb.agent("kiosk-2")
    await becomes(200, lambda: late.send(now - timedelta(minutes=1)))
    blocker = await asyncpg.connect(nexhb.database.dsn)
    await blocker.execute("BEGIN; LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
    swapped = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"["
        await swapped.wait()
        yield orjson.dumps(example(now - timedelta(minutes=2))) + b"]"

    queue = asyncio.create_task(late.post(body(), "/v1/heartbeats"))
    sent = asyncio.create_task(late.send(now))
    async with asyncio.timeout(SOON_S):
        while not await nexhb.rows(WAITING):
            await asyncio.sleep(0.01)
    await swap.put_in_place(copy)
    assert (await sent).status == 503
    await becomes(503, lambda: late.send(now))  # by now the other database has been noticed
    swapped.set()
    assert (await queue).status == 503
    assert await stored(nexhb) == []
    blocker.terminate()


async def test_an_older_copy_is_recognised_by_a_daemon_that_starts(
    start_daemon: StartDaemon, swap: Swap, now: datetime
) -> None:
    """data_dir remembers the generation: a device added since receives 503 even after a restart."""
    nexhb = await start_daemon()
    copy = await swap.copy()
    late = await nexhb.agent("kiosk-2")
    await becomes(200, lambda: late.send(now))
    await swap.put_in_place(copy)
    await is_held(late, now)
    late.nexhb = await start_daemon()
    assert (await late.send(now)).status == 503


async def test_a_restarted_daemon_knows_an_older_copy_that_was_not_recorded_in_the_database_yet(
    start_daemon: StartDaemon, swap: Swap, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon that finds the copy may be killed a moment later; here it adds nothing to the database before that."""
    monkeypatch.setattr(identity, "MIN_INTERVAL_S", 3600.0)
    nexhb = await start_daemon()
    await nexhb.agent("kiosk-1")
    async with asyncio.timeout(SOON_S):
        while (await nexhb.rows("SELECT max(generation) FROM database_generations"))[0][0] < 2:
            await asyncio.sleep(0.02)
    copy = await swap.copy()
    late = await nexhb.agent("kiosk-2")
    await becomes(200, lambda: late.send(now))
    await swap.put_in_place(copy)
    await is_held(late, now)
    late.nexhb = await start_daemon()
    assert (await late.send(now)).status == 503


async def test_a_restore_into_the_same_database_is_noticed_on_open_connections(nexhb: Nexhb, now: datetime) -> None:
    """pg_restore --clean ends no connection. Formerly, the daemon's memory still named labels and devices from before
    the restore."""
    agent = await nexhb.agent("kiosk-1")
    first = now - timedelta(minutes=1)
    assert (await agent.send(first, **named("Lost"))).status == 200
    conn = await nexhb.database.connect(application="test restore")
    async with conn.transaction():
        await conn.execute("TRUNCATE device_heartbeats, device_last_status, ingest_ledger, database_generations")
        await conn.execute("TRUNCATE heartbeat_labels RESTART IDENTITY")
        await conn.execute("INSERT INTO heartbeat_labels VALUES (DEFAULT, '1', '', 'wifi', 'Restored')")
    await conn.close()
    async with asyncio.timeout(SOON_S):
        while not await nexhb.metric("nexhb_database_older"):
            await asyncio.sleep(0.02)
    again = await becomes(200, lambda: agent.send(first, **named("Lost")))
    assert again.body["deduplicated"] is False
    assert await stored(nexhb) == [("kiosk-1", "Lost", first)]


async def test_a_copy_from_before_a_rotation_is_an_older_copy_even_without_a_new_generation(
    start_daemon: StartDaemon, swap: Swap, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the device but not its token. Formerly, the device received 401 if the primary was lost within a
    second of the rotation."""
    nexhb = await start_daemon()
    agent = await nexhb.agent("kiosk-1")
    assert (await agent.send(now)).status == 200

    async def never(_tracker: identity.DatabaseTracker, _database: Database) -> None:
        raise DatabaseUnavailable("No generation is added.")

    monkeypatch.setattr(identity.DatabaseTracker, "add", never)
    copy = await swap.copy()
    async with nexhb.database.connected(application="test") as conn:
        agent.token = await registry.rotate(conn, "kiosk-1")
    await becomes(200, lambda: agent.send(now))
    await swap.put_in_place(copy)
    await is_held(agent, now)


async def test_a_copy_with_every_change_is_a_move_and_no_token_receives_503(
    start_daemon: StartDaemon, swap: Swap, now: datetime
) -> None:
    """A copy or a restored dump made after the last change contains all that the previous database contained."""
    nexhb = await start_daemon()
    agent = await nexhb.agent("kiosk-1")
    assert (await agent.send(now)).status == 200
    copy = await swap.copy()
    await swap.put_in_place(copy)
    again = await becomes(200, lambda: agent.send(now))
    assert again.body["deduplicated"] is True
    assert "remarks" not in await nexhb.get("/readyz")
    agent.token = "0" * 43
    assert (await becomes(401, lambda: agent.send(now), never=200)).status == 401


async def test_a_lagging_standby_is_promoted(start_daemon: StartDaemon, now: datetime) -> None:
    """The standby has the system identifier and the oid of the primary and, behind a proxy, its address. Devices resend
    the heartbeats that only the primary had; no heartbeat of a device that the standby lacks is stored under the number
    of another device."""
    with guarding() as guard:
        async with (
            running(guard) as primary,
            standby_of(primary, guard) as standby,
            Proxy(primary.dsn).serving() as proxy,
        ):
            nexhb = replace(await start_daemon(url=proxy.dsn), database=Database(primary.dsn))
            agent = await nexhb.agent("kiosk-1")
            first = now - timedelta(minutes=5)
            assert (await agent.send(first, **named("Before"))).status == 200
            await caught_up(primary, standby)
            await standby.stop_receiving()
            lost = now - timedelta(minutes=4)
            assert (await agent.send(lost, **named("Lost"))).status == 200
            late = await nexhb.agent("kiosk-2")
            assert (await late.send(lost, **named("Lost"))).status == 200
            await standby.promote()
            proxy.redirect_to(standby.dsn)
            proxy.cut()
            again = await becomes(200, lambda: agent.send(lost, **named("Lost")))
            assert again.body["deduplicated"] is False
            assert (await late.send(now, **named("Lost"))).status == 503
            there = replace(nexhb, database=Database(standby.dsn))
            stranger = replace(await there.agent("kiosk-3"), nexhb=nexhb)
            await becomes(200, lambda: stranger.send(now, **named("Another")))
            assert await stored(there) == [
                ("kiosk-1", "Before", first), ("kiosk-1", "Lost", lost), ("kiosk-3", "Another", now),
            ]  # fmt: skip


async def caught_up(primary: Cluster, standby: Standby) -> None:
    """Wait until the standby has replayed all WAL of the primary."""
    conn, there = await asyncpg.connect(primary.dsn), await asyncpg.connect(standby.dsn)
    written = await conn.fetchval("SELECT pg_current_wal_flush_lsn()::text")
    async with asyncio.timeout(SOON_S):
        while not await there.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", written):
            await asyncio.sleep(0.02)
    conn.terminate()
    there.terminate()
