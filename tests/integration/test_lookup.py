"""nexhb looks up a token that it does not know in NexMDM's database: a heartbeat receives 401 only if neither system
knows its token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr

from bench.nexmdm import MONOLITHIC, add_devices, naive, token_hash, token_id
from nexhb import log, metrics
from nexhb.cli.daemon_client import query_daemon
from nexhb.cli.doctor import check_daemon
from nexhb.config import AuthSettings, LegacySettings
from nexhb.devices import registry, store
from nexhb.devices import tokens as device_tokens
from nexhb.nexmdm import devices as taking
from nexhb.nexmdm import lookup as lookups
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.adoption import Adoption, TokenStatus
from nexhb.nexmdm.lookup import Lookup, LookupResult
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.identity import DatabaseTracker, Mark
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon
from tests.proxy import Proxy
from tests.support.clock import Clock
from tests.support.nexmdm_rows import add_device
from tests.support.responses import until_answered

PASSWORD = "xk7-very-secret-0123456789"


def asks(dsn: str) -> dict[str, Any]:
    """Return the settings of a daemon that looks tokens up in this database, practically without rate limits."""
    auth = AuthSettings(admin_key=SecretStr(ADMIN_KEY), failures_per_minute=100_000)
    return {"legacy": LegacySettings(source=SecretStr(dsn)), "auth": auth}


@pytest.fixture
async def old(empty_database: Database, now: datetime) -> AsyncIterator[Connection]:
    """Create NexMDM's database, and yield a connection to it."""
    source = await empty_database.connect(application="test source")
    await MONOLITHIC.create(source, now, now)
    yield source
    source.terminate()


@pytest.fixture
async def moving(old: Connection, empty_database: Database, start_daemon: StartDaemon) -> Nexhb:
    """Start a daemon that looks tokens up in NexMDM's database."""
    return await start_daemon(**asks(empty_database.dsn))


async def enrolled(old: Connection, device_id: str, **columns: Any) -> str:
    """Enrol a device at NexMDM and return its token."""
    token = device_tokens.new_token()
    await add_device(old, device_id, token, **{"token_hash": token_hash(token)} | columns)
    return token


async def status(nexhb: Nexhb, token: str) -> int:
    """Return the status that a heartbeat with this token receives."""
    return (await Agent(nexhb, "any", token).send(nexhb.clock())).status


async def first_certain(nexhb: Nexhb, token: str) -> tuple[int, set[int]]:
    """Send until the status is not 503; return it, and the earlier statuses."""
    answer, before = await until_answered(lambda: Agent(nexhb, "any", token).send(nexhb.clock()))
    return answer.status, before


# ---- over HTTP --------------------------------------------------------------------------------------------------


async def test_a_device_enrolled_at_nexmdm_is_imported_with_its_first_heartbeat(
    old: Connection, moving: Nexhb, start_daemon: StartDaemon, conn: Connection
) -> None:
    """Formerly, a device that nexhb had not imported yet received 401 every time, and the agent erased its credentials
    with its third heartbeat."""
    other = await start_daemon(legacy=moving.settings.legacy, auth=moving.settings.auth)
    token = await enrolled(old, "kiosk-1", manufacturer="samsung")
    assert await status(moving, token) == 200
    assert await status(other, token) == 200
    row = await conn.fetchrow("SELECT device_id, model, manufacturer FROM devices")
    assert tuple(row or ()) == ("kiosk-1", "SM-T500", "samsung")
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history LIMIT 1") == "kiosk-1"
    assert await status(moving, device_tokens.new_token()) == 401
    assert await moving.metric('nexhb_legacy_lookups_total{outcome="taken"}') >= 1


async def test_two_daemons_that_import_a_device_at_once_both_return_200(
    old: Connection, moving: Nexhb, start_daemon: StartDaemon, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await start_daemon(legacy=moving.settings.legacy, auth=moving.settings.auth)

    async def hear_nothing(*_: object) -> None:
        """Ignore the notification, as if it arrived late: a remembered miss must not cause a 401."""

    monkeypatch.setattr(store.DeviceStore, "_apply_notification", hear_nothing)
    for n in range(5):
        token = await enrolled(old, f"kiosk-{n}")
        assert {*await asyncio.gather(status(moving, token), status(other, token))} == {200}
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 5


async def test_a_device_with_nothing_but_a_hash_is_imported_with_its_hash(
    old: Connection, moving: Nexhb, conn: Connection
) -> None:
    tokens = [await enrolled(old, f"kiosk-{n}", token_id=None) for n in range(3)]
    assert await first_certain(moving, tokens[1]) == (200, {503})
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history") == "kiosk-1"
    assert await first_certain(moving, device_tokens.new_token()) == (401, {503})
    # NexMDM has learned the token of this device in the meantime.
    await old.execute("UPDATE devices SET token_id = $1 WHERE id = 'kiosk-2'", token_id(tokens[2]))
    assert (await first_certain(moving, tokens[2]))[0] == 200


async def test_a_device_revoked_in_nexmdm_or_in_nexhb_receives_410(
    old: Connection, moving: Nexhb, conn: Connection, now: datetime
) -> None:
    there = await enrolled(old, "there", token_revoked_at=naive(now))
    here = await enrolled(old, "here")
    await registry.add(conn, "here", None)
    await registry.revoke(conn, "here", now)
    assert [await status(moving, token) for token in (there, here)] == [410, 410]


async def test_a_device_whose_id_nexhb_does_not_allow_receives_503_not_401(old: Connection, moving: Nexhb) -> None:
    """NexMDM knows the token, and after a 401 the device would erase it."""
    assert await status(moving, await enrolled(old, "offline")) == 503


@pytest.mark.parametrize("known_by", ["add", "import", "look-up", "hash"])
async def test_a_token_that_nexhb_replaced_is_not_imported_again(
    old: Connection, moving: Nexhb, conn: Connection, known_by: str
) -> None:
    """NexMDM still has the old token of a device that was rotated in nexhb, however the device was added to nexhb."""
    token = await enrolled(old, "kiosk-1", **({"token_id": None} if known_by == "hash" else {}))
    if known_by == "add":
        await registry.add(conn, "kiosk-1", None)
    elif known_by == "import":  # the import of a file, without NexMDM
        await registry.add(conn, "kiosk-1", None)
        await conn.execute("UPDATE device_tokens SET token_sha256 = $1", device_tokens.hash_token(token))
    else:
        assert (await first_certain(moving, token))[0] == 200
    new = await registry.rotate(conn, "kiosk-1")
    if known_by == "hash":
        await old.execute("UPDATE devices SET token_id = $1", token_id(token))
    async with asyncio.timeout(SOON_S):
        while await status(moving, token) != 401:
            pass
    assert await status(moving, token) == 401
    assert await status(moving, new) == 200
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_a_device_is_not_imported_while_its_token_is_being_rotated(
    old: Connection, moving: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, a rotation that began between two statements of the import and committed before the last one was
    overlooked."""
    token = await enrolled(old, "kiosk-1")
    await registry.add(conn, "kiosk-1", None)
    rotation, add, rotated = conn.transaction(), taking._add, asyncio.Event()

    async def add_and_rotate(*arguments: Any) -> None:
        await add(*arguments)
        if not rotated.is_set():
            await rotation.start()
            await registry.rotate(conn, "kiosk-1")
            rotated.set()

    monkeypatch.setattr(taking, "_add", add_and_rotate)
    asking = asyncio.create_task(status(moving, token))
    await rotated.wait()
    waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock')"
    while not await old.fetchval(waits, "nexhb taking over"):
        await asyncio.sleep(0.01)
    await rotation.commit()
    assert await asking in (401, 503)
    assert (await first_certain(moving, token))[0] == 401
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


# ---- while NexMDM's database does not respond ---------------------------------------------------------------------


async def test_no_token_receives_401_while_nexmdms_database_is_unavailable(
    old: Connection, empty_database: Database, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(lookups, "MAX_RETRY_S", 0.05)
    log.setup("info")
    known = await enrolled(old, "known")
    async with Proxy(empty_database.dsn).serving() as proxy:
        dsn = proxy.dsn.replace("@", f":{PASSWORD}@")
        nexhb = await start_daemon(**asks(dsn))
        assert await status(nexhb, known) == 200
        proxy.make_unreachable()
        new, stranger = await enrolled(old, "new"), device_tokens.new_token()
        assert {await status(nexhb, token) for token in (new, stranger, new, stranger)} == {503}
        assert await status(nexhb, known) == 200
        # The command may reach the database while the daemon, as another user, does not: the daemon itself reports it.
        assert ["legacy.source" in one for one in (await nexhb.get("/readyz"))["remarks"]] == [True]
        line = check_daemon(await query_daemon(nexhb.settings, nexhb.url), configured=True)
        assert (line.passed, "legacy.source cannot be queried" in line.detail) == (False, True)
        proxy.make_reachable()
        assert (await first_certain(nexhb, new))[0] == 200
        assert (await first_certain(nexhb, stranger))[0] == 401
        assert "remarks" not in await nexhb.get("/readyz")
    logged = capfd.readouterr().err
    assert '"event":"legacy.lookup_failed"' in logged
    assert '"event":"device.taken_over"' in logged
    assert not {PASSWORD, new, stranger, token_id(new), token_id(stranger)} & set(logged.replace('"', " ").split())
    assert PASSWORD not in logged
    assert new not in logged


async def test_a_database_that_does_not_respond_in_time_delays_no_request(
    old: Connection, empty_database: Database, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a table is locked, or the host is cut off, a heartbeat receives its response long before the agent gives up,
    and the daemon retries the lookup over a new connection."""
    failed, name = (
        'nexhb_legacy_lookups_total{outcome="failed"}',
        empty_database.dsn.partition("?")[0].rpartition("/")[2],
    )
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb look-up' AND datname = $1"
    token, other = await enrolled(old, "kiosk-1"), await enrolled(old, "kiosk-2")
    async with Proxy(empty_database.dsn).serving() as proxy:
        nexhb = await start_daemon(**asks(proxy.dsn))
        monkeypatch.setattr(lookups, "WAIT_S", 0.1)
        monkeypatch.setattr(lookups, "MAX_RETRY_S", 0.05)
        monkeypatch.setattr(lookups, "LOOKUP_TIMEOUT_S", 2.0 * SOON_S)
        before = await nexhb.metric(failed)
        async with old.transaction():
            await old.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")
            async with asyncio.timeout(SOON_S):
                assert [await status(nexhb, token) for _ in range(3)] == 3 * [503]
        assert (await first_certain(nexhb, token))[0] == 200
        assert await nexhb.metric(failed) == before
        monkeypatch.setattr(lookups, "LOOKUP_TIMEOUT_S", 0.5)
        devices_with = sources.NexmdmDatabase.devices_with
        with ExitStack() as stack:

            async def cut_off(self: sources.NexmdmDatabase, token_ids: list[str]) -> Any:
                stack.enter_context(proxy.stalled())  # now the query and a ROLLBACK get no response
                return await devices_with(self, token_ids)

            monkeypatch.setattr(sources.NexmdmDatabase, "devices_with", cut_off)
            async with asyncio.timeout(SOON_S):
                while await nexhb.metric(failed) < before + 2:
                    assert await status(nexhb, other) == 503
            assert await old.fetchval(sessions, name) <= 2  # the present session, and one still to be closed
        monkeypatch.setattr(sources.NexmdmDatabase, "devices_with", devices_with)
        monkeypatch.setattr(lookups, "LOOKUP_TIMEOUT_S", SOON_S)
        assert (await first_certain(nexhb, other))[0] == 200


async def test_with_a_source_that_is_not_a_nexmdm_database_no_token_is_unknown(
    start_daemon: StartDaemon, database: Database
) -> None:
    nexhb = await start_daemon(**asks(database.dsn))
    assert await status(nexhb, device_tokens.new_token()) == 503


# ---- the lookup alone ---------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A lookup, and the number of tokens of each of its queries."""

    lookup: Lookup
    looks: list[int]

    async def ask(self, *tokens: str) -> list[LookupResult]:
        """Look up all these tokens at once."""
        return list(await asyncio.gather(*(self.lookup.look_up(device_tokens.hash_token(token)) for token in tokens)))


@pytest.fixture
async def bench(
    old: Connection, empty_database: Database, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """Provide a running lookup."""
    looks: list[int] = []
    devices_with = sources.NexmdmDatabase.devices_with

    async def counted(self: sources.NexmdmDatabase, token_ids: list[str]) -> Any:
        looks.append(len(token_ids))
        return await devices_with(self, token_ids)

    monkeypatch.setattr(sources.NexmdmDatabase, "devices_with", counted)
    lookup = Lookup(empty_database.dsn, database, Clock())
    task = asyncio.create_task(lookup.run())
    yield Bench(lookup, looks)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await lookup.close()


async def test_a_flood_of_unknown_tokens_costs_few_queries_and_is_limited(bench: Bench, old: Connection) -> None:
    put_off = metrics.legacy_lookups.labels(outcome="put_off")._value
    flood, before = [f"stranger-{n}" for n in range(lookups.MAX_QUEUED + 500)], put_off.get()
    answers = await bench.ask(*flood)
    assert put_off.get() == before + 500
    assert set(answers) == {LookupResult.UNKNOWN, LookupResult.UNVERIFIED}
    assert answers.count(LookupResult.UNKNOWN) <= lookups.MAX_WAITING
    async with asyncio.timeout(SOON_S):
        while sum(bench.looks) < lookups.MAX_QUEUED:
            await asyncio.sleep(0.01)
        while await bench.ask(flood[lookups.MAX_QUEUED - 1]) != [LookupResult.UNKNOWN]:
            await asyncio.sleep(0.01)
    assert sum(bench.looks) == lookups.MAX_QUEUED, "tokens beyond the limit are not looked up"
    assert max(bench.looks) == lookups.MAX_BATCH
    # Unknown tokens are remembered, even if NexMDM has them by now; a token that was not looked up yet is imported.
    await add_devices(old, [("kiosk-1", flood[0]), ("kiosk-2", flood[-1])])
    looked = sum(bench.looks)
    assert await bench.ask(*flood[:100]) == [LookupResult.UNKNOWN] * 100
    assert sum(bench.looks) == looked
    assert await bench.ask(flood[-1]) == [LookupResult.IMPORTED]


async def test_hashes_are_imported_in_batches_and_no_token_is_unknown_before_all_are(
    bench: Bench, old: Connection, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_HASHED_IMPORTED", 2)
    hashed = token_hash("t" * 43)
    for n in range(5):
        await add_device(old, f"kiosk-{n}", token_id=None, token_hash=hashed)
    results = [await bench.ask("stranger") for _ in range(3)]
    assert results == [[LookupResult.UNVERIFIED], [LookupResult.UNVERIFIED], [LookupResult.UNKNOWN]]
    assert await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE bcrypt IS NOT NULL") == 5
    await conn.execute("DELETE FROM legacy_tokens")
    assert await bench.ask("another") == [LookupResult.UNKNOWN]
    assert await conn.fetchval("SELECT count(*) FROM legacy_tokens") == 0, "known devices are not imported again"


async def test_on_a_standby_a_token_is_unknown_only_after_a_later_commit(
    bench: Bench, old: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standby may not have a device that has just enrolled: a standby always lags, by minutes if it is busy."""
    clock = await old.fetchval("SELECT clock_timestamp()")
    replayed: list[datetime | None] = [None]

    async def state(self: sources.NexmdmDatabase) -> sources.SourceState:
        return sources.SourceState(has_hashes=False, is_standby=True, replayed=replayed[0], clock=clock)

    monkeypatch.setattr(sources.NexmdmDatabase, "state", state)
    for at in (None, clock - timedelta(hours=1), clock + timedelta(seconds=30)):
        replayed[0] = at
        assert await bench.ask("stranger") == [LookupResult.UNVERIFIED]
    await add_devices(old, [("kiosk-1", "present")])
    assert await bench.ask("present") == [LookupResult.IMPORTED]
    replayed[0] = clock + timedelta(seconds=61)
    assert await bench.ask("stranger") == [LookupResult.UNKNOWN]


async def test_nothing_is_imported_into_an_older_copy_of_nexhbs_database(
    old: Connection, bench: Bench, database: Database, conn: Connection
) -> None:
    """The copy may lack the replacement or revocation of a token in nexhb: an import from NexMDM would make that token
    valid again."""
    tracker = DatabaseTracker()
    adoption = Adoption(database, Clock(), tracker=tracker, lookup=bench.lookup)
    await add_devices(old, [("kiosk-1", "token")])
    tracker.missing = Mark(7, "x")  # type: ignore[arg-type]
    # The device receives 503 because of the copy.
    assert await adoption.status("token", device_tokens.hash_token("token")) is TokenStatus.UNKNOWN
    assert await conn.fetchval("SELECT count(*) FROM devices") == 0
    await adoption.close()
