"""A token that nexhb does not know is looked up in the database of NexMDM: 401 is said only where neither knows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr

from bench.nexmdm import MONOLITHIC, add_device, add_devices, naive, token_hash, token_id
from nexhb import devices, log, metrics
from nexhb.cli.asking import ask
from nexhb.cli.doctor import daemon_line
from nexhb.config import Auth, Legacy
from nexhb.db import Connection, Database
from nexhb.identity import Lives, Mark
from nexhb.legacy import devices as taking
from nexhb.legacy import lookup as lookups
from nexhb.legacy import source as sources
from nexhb.legacy.adopt import Adoption, Standing
from nexhb.legacy.lookup import Found, Lookup
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon
from tests.integration.test_adoption import until_answered
from tests.proxy import Proxy

PASSWORD = "xk7-very-secret-0123456789"


def asks(dsn: str) -> dict[str, Any]:
    """Settings of a daemon that looks tokens up there, and lets an address ask as often as a test does."""
    auth = Auth(admin_key=SecretStr(ADMIN_KEY), failures_per_minute=100_000)
    return {"legacy": Legacy(source=SecretStr(dsn)), "auth": auth}


@pytest.fixture
async def old(empty_database: Database, now: datetime) -> AsyncIterator[Connection]:
    """NexMDM's own connection to its database."""
    source = await empty_database.connect(application="test source")
    await MONOLITHIC.create(source, now, now)
    yield source
    source.terminate()


@pytest.fixture
async def moving(old: Connection, empty_database: Database, start_daemon: StartDaemon) -> Nexhb:
    """A daemon that may ask it."""
    return await start_daemon(**asks(empty_database.dsn))


async def enrolled(old: Connection, device_id: str, **columns: Any) -> str:
    """A device that enrolled at NexMDM; its token."""
    token = devices.new_token()
    await add_device(old, device_id, token, **{"token_hash": token_hash(token)} | columns)
    return token


async def status(nexhb: Nexhb, token: str) -> int:
    """What this token hears."""
    return (await Agent(nexhb, "any", token).send(datetime.now(UTC))).status


async def first_certain(nexhb: Nexhb, token: str) -> tuple[int, set[int]]:
    """The first answer that is no 503, and what was said before."""
    answer, before = await until_answered(lambda: Agent(nexhb, "any", token).send(datetime.now(UTC)))
    return answer.status, before


# ---- as a device sees it ----------------------------------------------------------------------------------------


async def test_a_device_enrolled_at_nexmdm_is_taken_over_with_its_first_heartbeat(
    old: Connection, moving: Nexhb, start_daemon: StartDaemon, conn: Connection
) -> None:
    """It heard 401 five times of five, and the agent erases its credentials with its third heartbeat."""
    other = await start_daemon(legacy=moving.settings.legacy, auth=moving.settings.auth)
    token = await enrolled(old, "kiosk-1", manufacturer="samsung")
    assert await status(moving, token) == 200
    assert await status(other, token) == 200
    row = await conn.fetchrow("SELECT device_id, model, manufacturer FROM devices")
    assert tuple(row or ()) == ("kiosk-1", "SM-T500", "samsung")
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history LIMIT 1") == "kiosk-1"
    assert await status(moving, devices.new_token()) == 401
    assert await moving.metric('nexhb_legacy_lookups_total{outcome="taken"}') >= 1


async def test_two_daemons_that_take_a_device_over_at_once_both_answer_200(
    old: Connection, moving: Nexhb, start_daemon: StartDaemon, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await start_daemon(legacy=moving.settings.legacy, auth=moving.settings.auth)

    async def hear_nothing(*_: object) -> None:
        """A notification that comes late: the miss of a moment ago must not make it 401."""

    monkeypatch.setattr(devices.DeviceStore, "_take_notice", hear_nothing)
    for n in range(5):
        token = await enrolled(old, f"kiosk-{n}")
        assert {*await asyncio.gather(status(moving, token), status(other, token))} == {200}
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 5


async def test_a_device_with_a_hash_alone_is_taken_over_by_its_hash(
    old: Connection, moving: Nexhb, conn: Connection
) -> None:
    tokens = [await enrolled(old, f"kiosk-{n}", token_id=None) for n in range(3)]
    assert await first_certain(moving, tokens[1]) == (200, {503})
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history") == "kiosk-1"
    assert await first_certain(moving, devices.new_token()) == (401, {503})
    # One that NexMDM has learned the token of meanwhile.
    await old.execute("UPDATE devices SET token_id = $1 WHERE id = 'kiosk-2'", token_id(tokens[2]))
    assert (await first_certain(moving, tokens[2]))[0] == 200


async def test_a_device_revoked_there_or_here_hears_410(
    old: Connection, moving: Nexhb, conn: Connection, now: datetime
) -> None:
    there = await enrolled(old, "there", token_revoked_at=naive(now))
    here = await enrolled(old, "here")
    await devices.add(conn, "here", None)
    await devices.revoke(conn, "here", now)
    assert [await status(moving, token) for token in (there, here)] == [410, 410]


async def test_a_device_that_nexhb_cannot_have_keeps_its_token(old: Connection, moving: Nexhb) -> None:
    """NexMDM knows it: 401 would be wrong."""
    assert await status(moving, await enrolled(old, "offline")) == 503


@pytest.mark.parametrize("known_by", ["add", "import", "look-up", "hash"])
async def test_a_token_replaced_here_does_not_come_back(
    old: Connection, moving: Nexhb, conn: Connection, known_by: str
) -> None:
    """NexMDM still has the old token of a device that was rotated here, however nexhb came to know the device."""
    token = await enrolled(old, "kiosk-1", **({"token_id": None} if known_by == "hash" else {}))
    if known_by == "add":
        await devices.add(conn, "kiosk-1", None)
    elif known_by == "import":  # of a table, which says nothing of NexMDM
        await devices.add(conn, "kiosk-1", None)
        await conn.execute("UPDATE device_tokens SET token_sha256 = $1", devices.hash_token(token))
    else:
        assert (await first_certain(moving, token))[0] == 200
    new = await devices.rotate(conn, "kiosk-1")
    if known_by == "hash":
        await old.execute("UPDATE devices SET token_id = $1", token_id(token))
    async with asyncio.timeout(SOON_S):
        while await status(moving, token) != 401:
            pass
    assert await status(moving, token) == 401
    assert await status(moving, new) == 200
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_a_device_is_not_taken_over_while_its_token_is_being_replaced(
    old: Connection, moving: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation that began between two statements of the taking over, and committed before its last, was not seen."""
    token = await enrolled(old, "kiosk-1")
    await devices.add(conn, "kiosk-1", None)
    rotation, add, rotated = conn.transaction(), taking._add, asyncio.Event()

    async def add_and_rotate(*arguments: Any) -> None:
        await add(*arguments)
        if not rotated.is_set():
            await rotation.start()
            await devices.rotate(conn, "kiosk-1")
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


# ---- while NexMDM's database does not answer ----------------------------------------------------------------------


async def test_while_nexmdms_database_is_away_nobody_hears_401(
    old: Connection, empty_database: Database, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(lookups, "RETRY_MOST_S", 0.05)
    log.setup("info")
    known = await enrolled(old, "known")
    async with Proxy(empty_database.dsn).serving() as proxy:
        dsn = proxy.dsn.replace("@", f":{PASSWORD}@")
        nexhb = await start_daemon(**asks(dsn))
        assert await status(nexhb, known) == 200
        proxy.take_away()
        new, stranger = await enrolled(old, "new"), devices.new_token()
        assert {await status(nexhb, token) for token in (new, stranger, new, stranger)} == {503}
        assert await status(nexhb, known) == 200
        # The command may reach it where the daemon, another user, does not: the daemon says so itself.
        assert ["legacy.source" in one for one in (await nexhb.get("/readyz"))["remarks"]] == [True]
        line = daemon_line(await ask(nexhb.settings, nexhb.url), configured=True)
        assert (line.good, "legacy.source cannot be asked" in line.said) == (False, True)
        proxy.give_back()
        assert (await first_certain(nexhb, new))[0] == 200
        assert (await first_certain(nexhb, stranger))[0] == 401
        assert "remarks" not in await nexhb.get("/readyz")
    said = capfd.readouterr().err
    assert '"event":"legacy.lookup_failed"' in said
    assert '"event":"device.taken_over"' in said
    assert not {PASSWORD, new, stranger, token_id(new), token_id(stranger)} & set(said.replace('"', " ").split())
    assert PASSWORD not in said
    assert new not in said


async def test_a_database_that_does_not_answer_in_time_holds_nobody_up(
    old: Connection, empty_database: Database, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is locked, a host that is cut off: the request is answered long before the agent gives up, and the
    daemon asks again over a new connection."""
    failed, name = (
        'nexhb_legacy_lookups_total{outcome="failed"}',
        empty_database.dsn.partition("?")[0].rpartition("/")[2],
    )
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb look-up' AND datname = $1"
    token, other = await enrolled(old, "kiosk-1"), await enrolled(old, "kiosk-2")
    async with Proxy(empty_database.dsn).serving() as proxy:
        nexhb = await start_daemon(**asks(proxy.dsn))
        monkeypatch.setattr(lookups, "ANSWER_S", 0.1)
        monkeypatch.setattr(lookups, "RETRY_MOST_S", 0.05)
        monkeypatch.setattr(lookups, "LOOK_S", 2.0 * SOON_S)
        before = await nexhb.metric(failed)
        async with old.transaction():
            await old.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")
            async with asyncio.timeout(SOON_S):
                assert [await status(nexhb, token) for _ in range(3)] == 3 * [503]
        assert (await first_certain(nexhb, token))[0] == 200
        assert await nexhb.metric(failed) == before
        monkeypatch.setattr(lookups, "LOOK_S", 0.5)
        devices_of = sources.Source.devices_of
        with ExitStack() as stack:

            async def cut_off(self: sources.Source, token_ids: list[str]) -> Any:
                stack.enter_context(proxy.stalled())  # within the transaction: nobody answers a rollback either
                return await devices_of(self, token_ids)

            monkeypatch.setattr(sources.Source, "devices_of", cut_off)
            async with asyncio.timeout(SOON_S):
                while await nexhb.metric(failed) < before + 2:
                    assert await status(nexhb, other) == 503
            assert await old.fetchval(sessions, name) <= 2  # one, and one that PostgreSQL has not found gone yet
        monkeypatch.setattr(sources.Source, "devices_of", devices_of)
        monkeypatch.setattr(lookups, "LOOK_S", SOON_S)
        assert (await first_certain(nexhb, other))[0] == 200


async def test_what_is_no_nexmdm_database_makes_nobody_unknown(start_daemon: StartDaemon, database: Database) -> None:
    nexhb = await start_daemon(**asks(database.dsn))
    assert await status(nexhb, devices.new_token()) == 503


# ---- the look-up alone --------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A look-up, and how often it has looked."""

    lookup: Lookup
    looks: list[int]

    async def ask(self, *tokens: str) -> list[Found]:
        """All of them at once."""
        return list(await asyncio.gather(*(self.lookup.ask(devices.hash_token(token)) for token in tokens)))


@pytest.fixture
async def bench(
    old: Connection, empty_database: Database, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """At work."""
    looks: list[int] = []
    devices_of = sources.Source.devices_of

    async def counted(self: sources.Source, token_ids: list[str]) -> Any:
        looks.append(len(token_ids))
        return await devices_of(self, token_ids)

    monkeypatch.setattr(sources.Source, "devices_of", counted)
    lookup = Lookup(empty_database.dsn, database, lambda: datetime.now(UTC))
    task = asyncio.create_task(lookup.run())
    yield Bench(lookup, looks)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await lookup.close()


async def test_a_flood_of_unknown_tokens_costs_few_looks_and_is_bounded(bench: Bench, old: Connection) -> None:
    put_off = metrics.legacy_lookups.labels(outcome="put_off")._value
    flood, before = [f"stranger-{n}" for n in range(lookups.LINE_MOST + 500)], put_off.get()
    answers = await bench.ask(*flood)
    assert put_off.get() == before + 500
    assert set(answers) == {Found.UNKNOWN, Found.UNSURE}
    assert answers.count(Found.UNKNOWN) <= lookups.HELD_MOST
    async with asyncio.timeout(SOON_S):
        while sum(bench.looks) < lookups.LINE_MOST:
            await asyncio.sleep(0.01)
        while await bench.ask(flood[lookups.LINE_MOST - 1]) != [Found.UNKNOWN]:
            await asyncio.sleep(0.01)
    assert sum(bench.looks) == lookups.LINE_MOST, "what was beyond the line is not asked for"
    assert max(bench.looks) == lookups.AT_ONCE
    # What was unknown is remembered, whatever NexMDM says now; what was not is found.
    await add_devices(old, [("kiosk-1", flood[0]), ("kiosk-2", flood[-1])])
    looked = sum(bench.looks)
    assert await bench.ask(*flood[:100]) == [Found.UNKNOWN] * 100
    assert sum(bench.looks) == looked
    assert await bench.ask(flood[-1]) == [Found.TAKEN]


async def test_hashes_are_taken_once_some_at_a_time_and_until_then_nobody_is_unknown(
    bench: Bench, old: Connection, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "HASHES_AT_ONCE", 2)
    hashed = token_hash("t" * 43)
    for n in range(5):
        await add_device(old, f"kiosk-{n}", token_id=None, token_hash=hashed)
    said = [await bench.ask("stranger") for _ in range(3)]
    assert said == [[Found.UNSURE], [Found.UNSURE], [Found.UNKNOWN]]
    assert await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE bcrypt IS NOT NULL") == 5
    await conn.execute("DELETE FROM legacy_tokens")
    assert await bench.ask("another") == [Found.UNKNOWN]
    assert await conn.fetchval("SELECT count(*) FROM legacy_tokens") == 0, "they are not written again"


async def test_a_standby_makes_a_token_unknown_only_with_a_later_commit(
    bench: Bench, old: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has just enrolled may not be there yet: a standby is always behind, by minutes where it is busy."""
    clock = await old.fetchval("SELECT clock_timestamp()")
    replayed: list[datetime | None] = [None]

    async def standing(self: sources.Source) -> sources.Standing:
        return sources.Standing(hashes=False, standby=True, replayed=replayed[0], clock=clock)

    monkeypatch.setattr(sources.Source, "standing", standing)
    for at in (None, clock - timedelta(hours=1), clock + timedelta(seconds=30)):
        replayed[0] = at
        assert await bench.ask("stranger") == [Found.UNSURE]
    await add_devices(old, [("kiosk-1", "present")])
    assert await bench.ask("present") == [Found.TAKEN]
    replayed[0] = clock + timedelta(seconds=61)
    assert await bench.ask("stranger") == [Found.UNKNOWN]


async def test_an_older_copy_of_nexhbs_own_database_takes_nobody_over(
    old: Connection, bench: Bench, database: Database, conn: Connection
) -> None:
    """That a token was replaced or revoked here may be among what the copy lacks: NexMDM would bring it back."""
    lives = Lives()
    adoption = Adoption(database, lambda: datetime.now(UTC), lives=lives, lookup=bench.lookup)
    await add_devices(old, [("kiosk-1", "token")])
    lives.missing = Mark(7, "x")  # type: ignore[arg-type]
    assert (
        await adoption.standing("token", devices.hash_token("token")) is Standing.NOBODYS
    )  # answered 503 for that copy
    assert await conn.fetchval("SELECT count(*) FROM devices") == 0
    await adoption.close()
