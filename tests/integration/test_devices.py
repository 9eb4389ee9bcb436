"""Devices are added, rotated, revoked, imported and enrolled, and every daemon applies each change at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr
from yarl import URL

from nexhb.config import AuthSettings
from nexhb.devices import csv_import, enrolment, registry
from nexhb.devices import store as device_store
from nexhb.devices import tokens as device_tokens
from nexhb.errors import BadInput, DatabaseUnavailable, DeviceExists, UnknownDevice
from nexhb.postgres import identity, sql
from nexhb.postgres.connections import Connection, Database
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Answer, Nexhb, StartDaemon
from tests.support import forks

Sending = Callable[[], Coroutine[Any, Any, Answer]]


async def becomes(expected: int, send: Sending) -> None:
    """Send requests until the response has this status."""
    status = 0
    try:
        async with asyncio.timeout(SOON_S):
            while status != expected:
                status = (await send()).status
    except TimeoutError:
        pytest.fail(f"after {SOON_S} s the status is still {status}, not {expected}")


def sending(nexhb: Nexhb, device_id: str, token: str, made_at: datetime) -> Sending:
    """Return a function that sends one heartbeat with this token to this daemon per call."""
    return lambda: Agent(nexhb, device_id, token).live(made_at)


@pytest.fixture
async def both(start_daemon: StartDaemon) -> list[Nexhb]:
    """Start two daemons on one database."""
    return [await start_daemon(), await start_daemon()]


# ---- add, rotate, revoke ----------------------------------------------------------------------------------------


async def test_a_new_devices_token_works_at_once_in_every_daemon(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await registry.add(conn, "kiosk-1", "Store 42")
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200
    assert (await both[0].get("/v1/devices/kiosk-1"))["device_id"] == "kiosk-1"


async def test_a_token_that_was_just_refused_works_as_soon_as_it_is_added(
    both: list[Nexhb], conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon remembers an unknown token for a while; a notification that the token was added ends that at once."""
    monkeypatch.setattr(device_store, "MISS_TTL_S", 60.0)
    token = device_tokens.new_token()
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 401
    monkeypatch.setattr(registry, "new_token", lambda: token)
    await registry.add(conn, "kiosk-1", None)
    for nexhb in both:
        await becomes(200, sending(nexhb, "kiosk-1", token, now))


async def test_rotation_ends_the_old_token_and_starts_the_new_one_in_every_daemon(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    old = await registry.add(conn, "kiosk-1", None)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", old, now)()).status == 200
    new = await registry.rotate(conn, "kiosk-1")
    assert new != old
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
        await becomes(401, sending(nexhb, "kiosk-1", old, now))
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_a_revoked_device_receives_410_from_every_daemon_and_rotation_readmits_it(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await registry.add(conn, "kiosk-1", None)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200
    await registry.revoke(conn, "kiosk-1", now)
    for nexhb in both:
        await becomes(410, sending(nexhb, "kiosk-1", token, now))
    new = await registry.rotate(conn, "kiosk-1")
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
        await becomes(401, sending(nexhb, "kiosk-1", token, now))
    assert await conn.fetchval("SELECT revoked_at FROM devices") is None
    assert (await both[0].get("/v1/devices/kiosk-1"))["status"] == "ok"


async def test_every_daemon_accepts_the_previous_token_of_a_readmitted_device(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await registry.add(conn, "kiosk-1", None)
    made_at = now - timedelta(hours=1)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, made_at)()).status == 200
    await registry.revoke(conn, "kiosk-1", now)
    for nexhb in both:
        await becomes(410, sending(nexhb, "kiosk-1", token, made_at))
        assert await offline(nexhb) == []
    assert await registry.readmit(conn, "kiosk-1") == registry.Readmitted(was_revoked=True, tokens=1)
    for nexhb in both:
        await becomes(200, sending(nexhb, "kiosk-1", token, made_at))
        assert await offline(nexhb) == ["kiosk-1"]
        assert (await nexhb.get("/v1/devices/kiosk-1"))["status"] == "ok"


async def offline(nexhb: Nexhb) -> list[str]:
    """Return the ids of the devices that this daemon lists as offline."""
    return [device["device_id"] for device in (await nexhb.get("/v1/devices/offline"))["devices"]]


async def test_a_token_that_was_revoked_on_its_own_stays_revoked(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    own = await registry.add(conn, "kiosk-0", None)
    await csv_import.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\n"))
    await conn.execute(
        "UPDATE device_tokens SET revoked_at = $2 WHERE token_sha256 = $1",
        device_tokens.hash_token(TOKENS[0]), now - timedelta(seconds=1),
    )  # fmt: skip
    neighbour = await registry.add(conn, "kiosk-1", None)
    for device_id in ("kiosk-0", "kiosk-1"):
        await registry.revoke(conn, device_id, now)  # at the same time
    await csv_import.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[1]}\n"))
    assert await registry.readmit(conn, "kiosk-0") == registry.Readmitted(was_revoked=True, tokens=2)
    for token, status in ((own, 200), (TOKENS[1], 200), (TOKENS[0], 410)):
        await becomes(status, sending(nexhb, "kiosk-0", token, now))
    await becomes(410, sending(nexhb, "kiosk-1", neighbour, now))


async def test_a_device_that_was_revoked_twice_is_readmitted_with_its_tokens(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The second revocation finds no valid token. If it changed the device's time of revocation, the readmission would
    restore no token."""
    token = await registry.add(conn, "kiosk-1", None)
    for after_s in (0, 60):
        await registry.revoke(conn, "kiosk-1", now + timedelta(seconds=after_s))
    assert await conn.fetchval("SELECT revoked_at FROM devices") == now
    assert (await registry.readmit(conn, "kiosk-1")).tokens == 1
    await becomes(200, sending(nexhb, "kiosk-1", token, now))


async def test_a_readmission_of_a_device_that_is_not_revoked_changes_nothing(conn: Connection, now: datetime) -> None:
    await registry.add(conn, "kiosk-1", None)
    everything = (
        "SELECT d.xmin, d.revoked_at, t.xmin, t.revoked_at FROM devices d JOIN device_tokens t USING (device_no)"
    )
    for revoked_at, tokens in ((None, 1), (now, 0)):  # even if its token alone was revoked
        await conn.execute("UPDATE device_tokens SET revoked_at = $1", revoked_at)
        before = await conn.fetch(everything)
        assert await registry.readmit(conn, "kiosk-1") == registry.Readmitted(was_revoked=False, tokens=tokens)
        assert await conn.fetch(everything) == before


async def test_a_readmission_waits_for_a_concurrent_change(database: Database, conn: Connection, now: datetime) -> None:
    await registry.add(conn, "kiosk-1", None)
    other = await database.connect(application="test", lock_timeout="5000")
    try:
        async with conn.transaction():
            await registry.revoke(conn, "kiosk-1", now)
            readmitting = asyncio.create_task(registry.readmit(other, "kiosk-1"))
            waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = $1"
            async with asyncio.timeout(SOON_S):
                while not await conn.fetch(waits, other.get_server_pid()):
                    assert not readmitting.done()
        assert await readmitting == registry.Readmitted(was_revoked=True, tokens=1)
    finally:
        other.terminate()


async def test_a_daemon_that_starts_later_tells_a_revoked_device_from_an_unknown_one(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    token = await registry.add(conn, "kiosk-1", None)
    await registry.revoke(conn, "kiosk-1", now)
    nexhb = await start_daemon()
    assert (await sending(nexhb, "kiosk-1", token, now)()).status == 410
    assert (await sending(nexhb, "kiosk-1", device_tokens.new_token(), now)()).status == 401


async def test_revoked_devices_are_neither_offline_nor_down_nor_counted(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agents = [await nexhb.agent(f"kiosk-{number}") for number in range(3)]
    for agent in agents:
        assert (await agent.live(now - timedelta(hours=1), unity_process_running=False)).status == 200
    await nexhb.agent("never-seen")

    async def read() -> tuple[dict[str, Any], list[str], list[str]]:
        lists = [await nexhb.get(f"/v1/devices/{which}") for which in ("offline", "unity-down")]
        for listed in lists:
            assert listed["count"] == len(listed["devices"])
        names = [sorted(device["device_id"] for device in listed["devices"]) for listed in lists]
        return await nexhb.get("/v1/fleet"), names[0], names[1]

    counts = ("devices", "online", "offline", "unity_down", "never_seen")
    fleet, offline, down = await read()
    assert [fleet[name] for name in counts] == [4, 0, 3, 3, 1]
    assert offline == down == ["kiosk-0", "kiosk-1", "kiosk-2"]
    await registry.revoke(conn, "kiosk-1", now)
    await registry.revoke(conn, "never-seen", now)
    fleet, offline, down = await read()
    assert [fleet[name] for name in counts] == [2, 0, 2, 2, 0]
    assert offline == down == ["kiosk-0", "kiosk-2"]
    listed = {row["device_id"]: row["status"] for row in (await nexhb.get("/v1/devices"))["devices"]}
    assert listed == {"kiosk-0": "ok", "kiosk-1": "revoked", "kiosk-2": "ok", "never-seen": "revoked"}
    await registry.rotate(conn, "kiosk-1")
    fleet, offline, down = await read()
    assert [fleet[name] for name in counts] == [3, 0, 3, 3, 0]
    assert offline == down == ["kiosk-0", "kiosk-1", "kiosk-2"]


async def test_an_id_that_is_in_use_or_unknown_or_invalid_is_rejected_and_changes_nothing(conn: Connection) -> None:
    await registry.add(conn, "kiosk-1", None)
    with pytest.raises(DeviceExists, match="'kiosk-1' is in use"):
        await registry.add(conn, "kiosk-1", "again")
    for refused in (
        registry.rotate(conn, "kiosk-2"),
        registry.revoke(conn, "kiosk-2", datetime.now(UTC)),
        registry.readmit(conn, "kiosk-2"),
    ):
        with pytest.raises(UnknownDevice, match="'kiosk-2'"):
            await refused
    for device_id in ("", "x" * 101, "a\0b", "a\nb"):
        with pytest.raises(BadInput, match="device_id takes 1 to 100 printable characters"):
            await registry.add(conn, device_id, None)
    with pytest.raises(BadInput, match="alias takes 1 to 200"):
        await registry.add(conn, "kiosk-3", "x" * 201)
    assert [tuple(row) for row in await conn.fetch("SELECT device_id, alias FROM devices")] == [("kiosk-1", None)]
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_devices_are_listed_page_by_page(conn: Connection) -> None:
    for number in range(5):
        await registry.add(conn, f"kiosk-{number}", None)
    first = await registry.page(conn, "", 3)
    second = await registry.page(conn, first[-1]["device_id"], 3)
    assert [row["device_id"] for row in (*first, *second)] == [f"kiosk-{number}" for number in range(5)]


async def test_only_the_sha256_of_a_token_or_key_is_stored(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    secrets = [await registry.add(conn, "kiosk-1", None), await registry.add(conn, "kiosk-2", None)]
    secrets.append(await registry.rotate(conn, "kiosk-2"))
    secrets.append(
        await enrolment.issue_enrolment_key(conn, note="n", uses=2, expires_at=datetime.now(UTC) + timedelta(hours=1))
    )
    secrets.append((await enrolment.enrol(conn, secrets[-1], "kiosk-3", None, datetime.now(UTC)))[1])
    assert (await sending(nexhb, "kiosk-1", secrets[0], now)()).status == 200
    columns = await conn.fetch(
        """SELECT format('%I', c.table_name) AS t, format('%I', c.column_name) AS c, data_type
        FROM information_schema.columns c JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
          AND data_type IN ('text', 'character varying', 'bytea', 'jsonb')"""
    )
    stored: dict[str, list[bytes]] = {}
    for row in columns:
        as_bytes = row["c"] if row["data_type"] == "bytea" else f"convert_to({row['c']}::text, 'UTF8')"
        found = await conn.fetch(f"SELECT {as_bytes} AS v FROM {row['t']} WHERE {row['c']} IS NOT NULL")
        stored[f"{row['t']}.{row['c']}"] = [value["v"] for value in found]
    assert {"device_tokens.token_sha256", "devices.alias", "enrolment_keys.key_sha256"} <= stored.keys()
    for secret in secrets:
        raw = base64.urlsafe_b64decode(secret + "=")
        for column, values in stored.items():
            for value in values:
                assert secret.encode() not in value, column
                assert raw not in value, column
    hashes = {hashlib.sha256(secrets[number].encode()).digest() for number in (0, 2, 4)}
    assert set(stored["device_tokens.token_sha256"]) == hashes
    assert stored["enrolment_keys.key_sha256"] == [hashlib.sha256(secrets[3].encode()).digest()]


# ---- a change is in force within seconds, whatever happens to the listener ------------------------------------------

FOLLOWER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb devices' AND datname = current_database()"


async def test_a_change_whose_notification_is_lost_is_in_force_within_seconds(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Formerly, a revocation whose notification was lost took effect only with the next full read of the store, after
    auth.refresh_seconds."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    listener = (await nexhb.rows(FOLLOWER))[0]["pid"]
    os.kill(listener, signal.SIGSTOP)  # the backend neither forwards notifications nor responds
    try:
        await registry.revoke(conn, agent.device_id, now)
        await becomes(410, sending(nexhb, agent.device_id, agent.token, now))
    finally:
        os.kill(listener, signal.SIGCONT)


async def test_a_change_that_is_counted_but_not_notified_is_noticed(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Notifications can be lost; the count of changes reveals it."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    async with conn.transaction():
        await conn.execute("SET LOCAL session_replication_role = replica")  # no trigger, and so no notification
        await registry.revoke(conn, agent.device_id, now)
        await conn.execute("INSERT INTO device_token_changes VALUES (-1, 1)")
    await becomes(410, sending(nexhb, agent.device_id, agent.token, now))


async def test_a_cancelled_statement_of_the_listener_costs_one_connection(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Formerly, the end of one connection was mistaken for the end of the next one, and so on, every 5 s for ever."""
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_token_changes IN ACCESS EXCLUSIVE MODE")  # the listener waits for this
        listener = await waits(nexhb)
        await conn.execute("SELECT pg_cancel_backend($1)", listener)
        async with asyncio.timeout(SOON_S):
            while listener in [row["pid"] for row in await nexhb.rows(FOLLOWER)]:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(SOON_S):
        while not (backends := await nexhb.rows(FOLLOWER + " AND state = 'idle'")):
            await asyncio.sleep(0.01)
    await registry.revoke(conn, agent.device_id, now)
    await becomes(410, sending(nexhb, agent.device_id, agent.token, now))
    polls = FOLLOWER + " AND query_start > $1 AND pid = $2"
    for _ in range(3):  # the listener keeps polling, on one connection
        since = await conn.fetchval("SELECT clock_timestamp()")
        async with asyncio.timeout(SOON_S):
            while not await nexhb.rows(polls, since, backends[0]["pid"]):
                await asyncio.sleep(0.05)


async def waits(nexhb: Nexhb) -> int:
    """Return the pid of the listener's backend once it waits for a lock."""
    async with asyncio.timeout(SOON_S):
        while not (backends := await nexhb.rows(FOLLOWER + " AND wait_event_type = 'Lock'")):
            await asyncio.sleep(0.01)
    return int(backends[0]["pid"])


# ---- no 401 before the store was read ---------------------------------------------------------------------------


async def test_a_token_added_without_a_notification_is_looked_up_in_the_store(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    await conn.execute("ALTER TABLE device_tokens DISABLE TRIGGER USER")
    token = await registry.add(conn, "kiosk-1", None)
    assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200


async def test_an_unknown_token_gets_a_response_only_after_the_store_was_read(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    token = device_tokens.new_token()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_tokens IN ACCESS EXCLUSIVE MODE")
        answer = asyncio.create_task(sending(nexhb, "kiosk-1", token, now)())
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%device_tokens%'"
        async with asyncio.timeout(SOON_S):
            while not (await nexhb.rows(waits))[0][0]:
                assert not answer.done()
        device_no = await conn.fetchval("INSERT INTO devices (device_id) VALUES ('kiosk-1') RETURNING device_no")
        await conn.execute("INSERT INTO device_tokens VALUES ($1, $2)", device_tokens.hash_token(token), device_no)
        assert not answer.done()
    assert (await answer).status == 200  # the lookup returned the new token


async def test_an_unknown_token_is_looked_up_once_and_not_for_each_heartbeat(
    nexhb: Nexhb, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "MISS_TTL_S", 60.0)
    token = device_tokens.new_token()
    assert (await sending(nexhb, "stray", token, now)()).status == 401
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_tokens IN ACCESS EXCLUSIVE MODE")  # a second lookup would hang here
        for _ in range(20):
            assert (await asyncio.wait_for(sending(nexhb, "stray", token, now)(), SOON_S)).status == 401


# ---- import -----------------------------------------------------------------------------------------------------


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a text to a file and returns its path."""

    def write(text: str) -> Path:
        file = tmp_path / "devices.csv"
        file.write_text(text, encoding="utf-8")
        return file

    return write


TOKENS = [f"token-{number}-of-an-old-system-0123456789" for number in range(6)]


async def stored(conn: Connection) -> set[tuple[str, str | None, bytes]]:
    """Return (device_id, alias, token_sha256) of every token."""
    rows = await conn.fetch("SELECT device_id, alias, token_sha256 FROM devices JOIN device_tokens USING (device_no)")
    return {tuple(row) for row in rows}


async def test_tokens_and_their_hashes_are_imported_and_work(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    # NexMDM's token_id is the SHA-256 of the token in hex.
    token_id = hashlib.sha256(TOKENS[1].encode()).hexdigest()
    file = csv(
        "device_id,alias,token,token_sha256\n"
        f'kiosk-0,"Store 42, by the door",{TOKENS[0]},\n'
        f"kiosk-1,,,{token_id}\n"
        f" kiosk-2 , Straße , {TOKENS[2]} ,{token_id}\n"
        f"kiosk-3,,,{hashlib.sha256(TOKENS[3].encode()).hexdigest().upper()}\n"
    )
    assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(rows=4, devices_made=4, tokens_added=4)
    aliases = ["Store 42, by the door", None, "Straße", None]
    assert await stored(conn) == {
        (f"kiosk-{n}", alias, device_tokens.hash_token(TOKENS[n])) for n, alias in enumerate(aliases)
    }
    for number in range(4):
        assert (await sending(nexhb, f"kiosk-{number}", TOKENS[number], now)()).status == 200


WORLD = ["渋谷店\u30003号機", "فروشگاه می\u200cدان", "Магазин 7", "חנות\u200f 7"]  # noqa: RUF001


async def test_operators_may_use_every_name_that_heartbeats_may_use(
    open_house: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path], tmp_path: Path
) -> None:
    """Formerly, import, add and register rejected an ideographic space or a zero-width non-joiner; import rejected the
    whole file."""
    key = await enrolment.issue_enrolment_key(conn, note=WORLD[0], uses=10, expires_at=now + timedelta(days=1))
    body = "".join(f"{name}-i;{name};{'i' * 40}{n}\r\n" for n, name in enumerate(WORLD))
    file = csv("Device ID;Alias;Token\r\n;;\r\n" + body)
    assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(4, 4, 4)
    for name in WORLD:
        await registry.add(conn, f"{name}-a", name)
        assert (await register(open_house, key, f"{name}-r", alias=name)).status == 200
        assert (await (await open_house.agent(f"{name}-h")).send(now, alias=name)).status == 200
    listed = (await open_house.get("/v1/devices"))["devices"]
    assert {(row["device_id"], row["alias"]) for row in listed} == {(f"{n}-{way}", n) for n in WORLD for way in "iarh"}
    listing = await asyncio.create_subprocess_exec(  # not a fork: only the start of Python reads LANG
        sys.executable, "-m", "nexhb", "devices", "list",
        env={"DATABASE_URL": open_house.database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "COLUMNS": "20", "LANG": "C"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    lines = (await asyncio.wait_for(listing.communicate(), SOON_S))[0].decode().splitlines()
    assert lines[0] == "device_id\tname\talias\tsite\ttags\tmodel\tlast heartbeat\trevoked"
    found = sorted(line.split("\t")[0:3:2] for line in lines[1:])
    assert found == sorted([row["device_id"], row["alias"]] for row in listed)
    for name in ("a\tb", "a\u2028b", "a\u202eb", "a\ud83d"):
        with pytest.raises(BadInput, match=r"; U\+[0-9A-F]{4} is not printable"):
            await registry.add(conn, name, None)


async def test_every_bad_line_of_a_file_is_named_up_to_twenty(conn: Connection, csv: Callable[[str], Path]) -> None:
    bad = "".join(f"kiosk-{n},a\u2028b,{'x' * 40}{n}\n" for n in range(25))
    with pytest.raises(BadInput) as refused:
        await csv_import.import_csv(conn, csv(f"device_id,alias,token\ngood,,{TOKENS[0]}\n{bad}last,,short\n"))
    assert [f"line {n}: " in str(refused.value) for n in (2, 3, 22, 23)] == [False, True, True, False]
    assert "and 6 more lines. Nothing was imported." in str(refused.value)
    assert await stored(conn) == set()


async def test_a_second_import_changes_nothing(conn: Connection, csv: Callable[[str], Path]) -> None:
    file = csv("\ufeffdevice_id,token\n" + "".join(f"kiosk-{n},{TOKENS[n]}\n" for n in range(3)))
    assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(3, 3, 3)
    before = await stored(conn)
    assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(3, 0, 0)
    assert await stored(conn) == before


async def test_a_known_device_keeps_its_number_its_token_and_unless_given_its_alias(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    own = await registry.add(conn, "kiosk-0", "Store 42")
    device_no = await conn.fetchval("SELECT device_no FROM devices")
    assert await csv_import.import_csv(
        conn, csv(f"device_id,alias,token\nkiosk-0,,{TOKENS[0]}\n")
    ) == csv_import.CsvImport(1, 0, 1)
    [row] = await conn.fetch("SELECT device_no, alias FROM devices")
    assert tuple(row) == (device_no, "Store 42")
    for token in (own, TOKENS[0]):
        assert (await sending(nexhb, "kiosk-0", token, now)()).status == 200


async def test_rows_of_revoked_devices_are_counted(conn: Connection, now: datetime, csv: Callable[[str], Path]) -> None:
    file = csv("device_id,token\n" + "".join(f"kiosk-{n},{TOKENS[n]}\n" for n in range(3)))
    assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(3, 3, 3, 0)
    for revoked in (1, 2):
        await registry.revoke(conn, f"kiosk-{revoked}", now)
        assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(3, 0, 0, revoked)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[1]}\na,{TOKENS[2]}\n", "line 4 (a): its device_id is in the file"),
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[0]}\n", "line 3 (b): its token is in the file twice"),
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[5]}\n", "line 3 (b): its token belongs to another device"),
        (f"device_id,token\na,{TOKENS[0]}\n,{TOKENS[1]}\n", "line 3: device_id takes 1 to 100"),
        (f"device_id,token\na,{TOKENS[0]}\n{'x' * 101},{TOKENS[1]}\n", "line 3: device_id takes 1 to 100"),
        (f"device_id,alias,token\na,,{TOKENS[0]}\nb,{'x' * 201},{TOKENS[1]}\n", "line 3: alias takes 1 to 200"),
        (f"device_id,token\na,{TOKENS[0]}\nb,short\n", "line 3: a token must have at least 32 characters"),
        (f"device_id,token\na,{TOKENS[0]}\nb\n", "line 3: needs a token, or its SHA-256"),
        (f"device_id,token_sha256\na,{'ab' * 31}\n", "line 2: needs a token, or its SHA-256 as 64 hexadecimal digits"),
        (f"device_id,token_sha256\na,{'xy' * 32}\n", "line 2: needs a token, or its SHA-256"),
        (f'device_id,token\na,"{TOKENS[0]}\n', "unexpected end of data"),
        (f"id,token\na,{TOKENS[0]}\n", "the first line must name"),
        ("device_id,alias\na,b\n", "the first line must name"),
        ("", "the first line must name"),
    ],
)
async def test_a_bad_line_is_named_and_nothing_is_imported(
    conn: Connection, csv: Callable[[str], Path], text: str, says: str
) -> None:
    await csv_import.import_csv(conn, csv(f"device_id,token\nmine,{TOKENS[5]}\n"))
    before = await stored(conn)
    with pytest.raises(BadInput) as caught:
        await csv_import.import_csv(conn, csv(text))
    assert says in str(caught.value)
    assert await stored(conn) == before
    assert await conn.fetchval("SELECT count(*) FROM devices") == 1


async def test_twenty_thousand_devices_are_imported_by_a_few_statements_beside_a_running_daemon(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    """The import takes half a second on a quiet machine; one row at a time would take minutes."""
    tokens = [f"{number:05d}-{'t' * 40}" for number in range(20_000)]
    lines = [f"kiosk-{number},Store {number},{token}" for number, token in enumerate(tokens)]
    file = csv("device_id,alias,token\n" + "\n".join(lines) + "\n")
    statements: list[str] = []
    with conn.query_logger(lambda logged: statements.append(logged.query)):
        assert await csv_import.import_csv(conn, file) == csv_import.CsvImport(20_000, 20_000, 20_000)
    assert len(statements) < 12
    # The changes exceed what a notification can hold, so the daemon reads the whole store again.
    async with asyncio.timeout(SOON_S):
        while await nexhb.metric("nexhb_devices_known") != 20_000:
            pass
    for number in (0, 9_999, 19_999):
        assert (await sending(nexhb, f"kiosk-{number}", tokens[number], now)()).status == 200


# ---- enrolment --------------------------------------------------------------------------------------------------


@pytest.fixture
async def open_house(start_daemon: StartDaemon) -> Nexhb:
    """Start a daemon at which devices may register themselves."""
    return await start_daemon(auth=AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))


async def issue(nexhb: Nexhb, **options: Any) -> str:
    """Issue an enrolment key over HTTP, as an operator does."""
    headers = {"x-admin": ADMIN_KEY, "Content-Type": "application/json"}
    url = f"{nexhb.url}/ops/enrolment-keys"
    async with nexhb.http.post(url, data=orjson.dumps(options), headers=headers) as response:
        body = await response.json()
        assert response.status == 200, body
        return str(body["enrolment_key"])


async def register(nexhb: Nexhb, key: str, device_id: str | None = None, **more: Any) -> Answer:
    """Register a device with the request that the device sends itself."""
    body = more | ({"device_id": device_id} if device_id is not None else {})
    return await Agent(nexhb, "", key).post(orjson.dumps(body), "/v1/register")


async def uses_left(nexhb: Nexhb) -> int:
    """Return how many uses the only enrolment key has left."""
    [row] = await nexhb.rows("SELECT uses_left FROM enrolment_keys")
    return int(row["uses_left"])


async def test_a_registration_without_a_key_is_rejected_before_its_body_is_read(open_house: Nexhb) -> None:
    host, port = open_house.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
    async with asyncio.timeout(SOON_S):
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"401"
    writer.close()


async def test_a_device_registers_itself_and_its_token_works(open_house: Nexhb, now: datetime) -> None:
    key = await issue(open_house, uses=2, note="Store 42")
    answer = await register(open_house, key, "kiosk-1", alias="by the door")
    assert (answer.status, answer.body["device_id"]) == (200, "kiosk-1")
    assert (await sending(open_house, "kiosk-1", answer.body["device_token"], now)()).status == 200
    assert (await open_house.rows("SELECT alias FROM devices"))[0]["alias"] == "Store 42 - kiosk 3"  # its heartbeat's
    assert await uses_left(open_house) == 1
    nameless = await register(open_house, key)
    assert nameless.status == 200
    assert len(nameless.body["device_id"]) == 36
    assert await uses_left(open_house) == 0


async def test_a_key_that_is_used_up_expired_unknown_or_missing_receives_401(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(auth=AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open"), now=now)
    used_up = await issue(nexhb, uses=1)
    assert (await register(nexhb, used_up)).status == 200
    hour = await issue(nexhb, uses=9, expires_in_seconds=3600)
    nexhb.clock.fixed = now + timedelta(seconds=3599)
    assert (await register(nexhb, hour)).status == 200
    nexhb.clock.fixed = now + timedelta(seconds=3600)
    before = await nexhb.metric('nexhb_unauthorized_total{kind="enrolment"}')
    keys = (used_up, hour, device_tokens.new_token(), "", ADMIN_KEY)
    for key in keys:
        answer = await register(nexhb, key)
        assert answer.status == 401
        assert "device_token" not in answer.body
    assert await nexhb.metric('nexhb_unauthorized_total{kind="enrolment"}') == before + len(keys)
    assert len(await nexhb.rows("SELECT FROM devices")) == 2


async def test_with_enrolment_by_token_no_device_can_register_itself(nexhb: Nexhb) -> None:
    key = await issue(nexhb, uses=1)
    assert (await register(nexhb, key, "kiosk-1")).status == 403
    assert await nexhb.rows("SELECT FROM devices") == []
    assert await uses_left(nexhb) == 1


async def test_an_id_that_is_in_use_or_invalid_does_not_spend_the_use(open_house: Nexhb) -> None:
    key = await issue(open_house, uses=1)
    agent = await open_house.agent("kiosk-1")
    taken = await register(open_house, key, "kiosk-1")
    assert (taken.status, "device_token" in taken.body) == (409, False)
    for unfit in ({"device_id": "x" * 101}, {"device_id": "a\0b"}, {"device_id": "a", "alias": "x" * 201}):
        assert (await register(open_house, key, **unfit)).status == 422
    for nonsense in (b"[]", b"{", b'{"device_id":7}', b'{"device_id":"\\ud800"}'):
        assert (await Agent(open_house, "", key).post(nonsense, "/v1/register")).status == 400
    assert await uses_left(open_house) == 1
    assert (await register(open_house, key, "kiosk-2")).status == 200
    known = await open_house.rows("SELECT device_id, token_sha256 FROM device_tokens JOIN devices USING (device_no)")
    assert (agent.device_id, device_tokens.hash_token(agent.token)) in {tuple(row) for row in known}


async def test_a_registration_whose_response_was_lost_can_be_repeated(
    open_house: Nexhb, now: datetime, conn: Connection
) -> None:
    """Formerly, the device received 409 for ever: its token was only in the lost response."""
    key, other = await issue(open_house, uses=1), await issue(open_house, uses=5)
    lost = await register(open_house, key, "kiosk-1", alias="by the door")
    again = await register(open_house, key, "kiosk-1")
    assert (lost.status, again.status) == (200, 200)
    assert lost.body["device_token"] != again.body["device_token"]
    left = {row[0]: row[1] for row in await open_house.rows("SELECT key_sha256, uses_left FROM enrolment_keys")}
    assert (left[device_tokens.hash_token(key)], left[device_tokens.hash_token(other)]) == (0, 5)
    for wrong, status in ((other, 409), (device_tokens.new_token(), 401)):
        assert (await register(open_house, wrong, "kiosk-1")).status == status
    assert (await register(open_house, key, "kiosk-2")).status == 401
    for bad in ("x" * 201, "a\u2028b"):
        assert (await register(open_house, key, "kiosk-1", alias=bad)).status == 422
    await becomes(401, sending(open_house, "kiosk-1", lost.body["device_token"], now))
    assert (await sending(open_house, "kiosk-1", again.body["device_token"], now)()).status == 200
    assert (await open_house.get("/v1/devices/kiosk-1"))["alias"] == "Store 42 - kiosk 3"
    assert (await register(open_house, key, "kiosk-1")).status == 401, "the device has sent, so it received its token"
    assert (await register(open_house, other, "kiosk-1")).status == 409
    for name, ended in (
        ("rotated", registry.rotate(conn, "rotated")),
        ("revoked", registry.revoke(conn, "revoked", now)),
    ):
        assert (await register(open_house, other, name)).status == 200
        await ended
        assert (await register(open_house, other, name)).status == 409, "only an operator may give it a token now"


@pytest.mark.parametrize("component", ["ConfigReceiver", "EnrollmentActivity"])
async def test_the_agent_enrols_itself_by_either_of_its_requests(
    open_house: Nexhb, now: datetime, component: str
) -> None:
    """The agent sends its key as X-Admin-Key with the alias in the body, or as X-Admin with ?alias= and no body.
    Formerly, nexhb accepted neither header and rejected the parameter. The agent reads device_token and device_id from
    a 200."""
    key, alias = await issue(open_house, uses=1), "Store 42 - kiosk 3 / ü"
    if component == "ConfigReceiver":
        url, body = "/v1/register", orjson.dumps({"alias": alias})
        headers = {"X-Admin-Key": key, "Content-Type": "application/json; charset=utf-8"}
    else:
        url, body = f"/v1/register?alias={quote(alias)}", b""
        headers = {"X-Admin": key, "Content-Type": "application/json"}
    async with open_house.http.post(URL(open_house.url + url, encoded=True), data=body, headers=headers) as response:
        answer = await response.json()
        assert (response.status, answer.keys()) == (200, {"device_id", "device_token"}), answer
    assert [tuple(row) for row in await open_house.rows("SELECT device_id, alias FROM devices")] == [
        (answer["device_id"], alias)
    ]
    assert (await sending(open_house, answer["device_id"], answer["device_token"], now)()).status == 200
    for wrong in ({"X-Admin-Key": device_tokens.new_token()}, {"X-Admin": ADMIN_KEY}, {"X-Admin": ""}):
        refused = open_house.http.post(f"{open_house.url}/v1/register", json={"alias": "x"}, headers=wrong)
        async with refused as response:
            assert response.status == 401
    assert await uses_left(open_house) == 0


async def test_an_agent_that_did_not_receive_the_response_enrols_again_by_its_alias(
    open_house: Nexhb, now: datetime
) -> None:
    """The agent sends no device_id when it enrols. Formerly, a lost response spent the only use of its key. While a key
    has uses left, the same alias may belong to another kiosk: both are enrolled, and neither loses its token."""
    batch = await issue(open_house, uses=2)
    kiosks = [await register(open_house, batch, alias="Kiosk") for _ in range(2)]
    assert len({kiosk.body["device_id"] for kiosk in kiosks}) == 2
    assert (await register(open_house, batch, alias="Kiosk")).status == 401, "the alias is ambiguous"
    for kiosk in kiosks:
        assert (await sending(open_house, kiosk.body["device_id"], kiosk.body["device_token"], now)()).status == 200
    key = await issue(open_house, uses=1)
    lost = await register(open_house, key, alias="by the door")
    assert (await register(open_house, key, alias="by the window")).status == 401
    assert (await register(open_house, key)).status == 401
    again = await register(open_house, key, alias="by the door")
    assert (again.status, again.body["device_id"]) == (200, lost.body["device_id"])
    await becomes(401, sending(open_house, "", lost.body["device_token"], now))
    assert (await sending(open_house, "", again.body["device_token"], now)()).status == 200
    assert (await register(open_house, key, alias="by the door")).status == 401, (
        "the device has sent, so it has its token"
    )


async def test_a_repeated_registration_waits_for_a_concurrent_rotation(
    open_house: Nexhb, conn: Connection, now: datetime
) -> None:
    """Formerly, the repeated registration replaced the token that the rotation had just issued."""
    key = await issue(open_house, uses=5)
    assert (await register(open_house, key, "kiosk-1")).status == 200
    async with conn.transaction():
        token = await registry.rotate(conn, "kiosk-1")
        again = asyncio.create_task(register(open_house, key, "kiosk-1"))
        waits = "SELECT FROM pg_stat_activity WHERE application_name = 'nexhb http' AND wait_event_type = 'Lock'"
        async with asyncio.timeout(SOON_S):
            while not await open_house.rows(waits):
                assert not again.done()
                await asyncio.sleep(0.01)
    assert (await again).status == 409
    assert (await sending(open_house, "kiosk-1", token, now)()).status == 200


async def test_a_revoked_device_is_not_admitted_by_the_key_that_it_registered_with(
    open_house: Nexhb, conn: Connection
) -> None:
    """The key does not admit the device even if the device was revoked by hand in SQL, which leaves its enrolment
    recorded."""
    key = await issue(open_house, uses=5)
    assert (await register(open_house, key, "kiosk-1")).status == 200
    await conn.execute("UPDATE devices SET revoked_at = now()")
    assert (await register(open_house, key, "kiosk-1")).status == 409


async def test_exactly_as_many_concurrent_registrations_succeed_as_the_key_has_uses(start_daemon: StartDaemon) -> None:
    auth = AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open")
    daemons = [await start_daemon(auth=auth), await start_daemon(auth=auth)]
    for uses, racers in ((1, 2), (1, 2), (3, 8)):
        key = await issue(daemons[0], uses=uses)
        answers = await asyncio.gather(*(register(daemons[number % 2], key) for number in range(racers)))
        assert sorted(answer.status for answer in answers) == [200] * uses + [401] * (racers - uses)
    rows = await daemons[0].rows("SELECT DISTINCT uses_left FROM enrolment_keys")
    assert [row["uses_left"] for row in rows] == [0]


async def test_the_uses_and_the_lifetime_of_an_enrolment_key_are_limited(nexhb: Nexhb) -> None:
    agent = Agent(nexhb, "", ADMIN_KEY)
    for options, status in (
        ({"uses": 0}, 422),
        ({"uses": 1_000_001}, 422),
        ({"expires_in_seconds": 59}, 422),
        ({"uses": "many"}, 400),
        ({"use": 1}, 400),
    ):
        assert (await agent.post(orjson.dumps(options), "/ops/enrolment-keys")).status == status
    agent.token = "not the key"
    assert (await agent.post(b"{}", "/ops/enrolment-keys")).status == 401
    assert await nexhb.rows("SELECT FROM enrolment_keys") == []


# ---- revoked devices ------------------------------------------------------------------------------------------


async def test_an_import_does_not_admit_a_revoked_device(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    await registry.add(conn, "kiosk-0", None)
    await registry.revoke(conn, "kiosk-0", now)
    try:
        await csv_import.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\n"))
    except BadInput:
        return
    assert (await sending(nexhb, "kiosk-0", TOKENS[0], now)()).status == 410


async def revoked_while_its_heartbeat_waits(
    nexhb: Nexhb, conn: Connection, database: Database, made_at: datetime, *, later: bool = False
) -> None:
    """Send a heartbeat, the device's first or a later one, that is admitted before the device is revoked, and committed
    after it is."""
    agent = await nexhb.agent("kiosk-1")
    if later:
        assert (await agent.send(made_at - timedelta(minutes=1))).status == 200
    other = await database.connect(application="test")
    async with conn.transaction():
        # The lock is acquired before the transaction of the writer, which has to add a label and so waits.
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")
        sent = asyncio.create_task(agent.send(made_at, unity_process_running=False, app_version="2.0"))
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'nexhb writer'"
        async with asyncio.timeout(SOON_S):
            while not await nexhb.rows(waits):
                pass
        await registry.revoke(other, "kiosk-1", made_at)
    assert (await sent).status == 200
    other.terminate()


@pytest.mark.parametrize("later", [False, True])
async def test_a_device_revoked_while_its_heartbeat_waits_is_in_no_list(
    nexhb: Nexhb, conn: Connection, database: Database, now: datetime, later: bool
) -> None:
    await revoked_while_its_heartbeat_waits(nexhb, conn, database, now - timedelta(hours=1), later=later)
    fleet = await nexhb.get("/v1/fleet")
    assert [fleet[name] for name in ("devices", "online", "offline", "unity_down", "never_seen")] == [0] * 5
    for which in ("offline", "unity-down"):
        assert (await nexhb.get(f"/v1/devices/{which}"))["devices"] == []
    status = await nexhb.get("/v1/devices/kiosk-1")
    assert (status["status"], status["agent_version"]) == ("revoked", "2.0")


async def test_a_device_revoked_while_its_first_heartbeat_waits_is_not_online_and_is_shown_as_revoked(
    nexhb: Nexhb, conn: Connection, database: Database, now: datetime
) -> None:
    await revoked_while_its_heartbeat_waits(nexhb, conn, database, now)
    shown = [(await nexhb.get("/v1/fleet"))["online"], (await nexhb.get("/v1/devices/kiosk-1"))["status"]]
    assert shown == [0, "revoked"]


async def test_an_import_that_is_not_utf8_is_rejected(conn: Connection, tmp_path: Path) -> None:
    file = tmp_path / "latin1.csv"
    file.write_bytes(f"device_id,alias,token\nkiosk-0,Straße,{TOKENS[0]}\n".encode("latin-1"))
    with pytest.raises(BadInput):
        await csv_import.import_csv(conn, file)


async def test_an_import_whose_first_line_is_not_csv_is_rejected(conn: Connection, csv: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput):
        await csv_import.import_csv(conn, csv(f'"device_id"x,token\nkiosk-0,{TOKENS[0]}\n'))


async def test_a_line_that_is_not_csv_is_named(conn: Connection, csv: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="line 3"):
        await csv_import.import_csv(conn, csv(f'device_id,token\na,{TOKENS[0]}\nb,"{TOKENS[1]}"x\nc,{TOKENS[2]}\n'))


async def test_an_enrolment_key_that_is_not_utf8_receives_401(open_house: Nexhb) -> None:
    port = int(open_house.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/register HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe4\xff\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    answer = await asyncio.wait_for(reader.read(), SOON_S)
    writer.close()
    assert answer.split()[1] == b"401"


async def test_a_note_that_cannot_be_stored_is_rejected(nexhb: Nexhb) -> None:
    answer = await Agent(nexhb, "", ADMIN_KEY).post(b'{"note":"a\\u0000b"}', "/ops/enrolment-keys")
    assert answer.status in (400, 422)


async def test_a_registration_receives_503_while_the_database_keeps_it_waiting(
    open_house: Nexhb, conn: Connection
) -> None:
    key = await issue(open_house, uses=1)
    async with conn.transaction():
        await conn.execute("LOCK TABLE enrolment_keys IN ACCESS EXCLUSIVE MODE")
        answer = await register(open_house, key, "kiosk-1")
    assert answer.status == 503
    assert "Retry-After" in answer.headers


# ---- commands -------------------------------------------------------------------------------------------------------


async def test_the_command_readmit_undoes_a_revocation(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path, csv: Callable[[str], Path]
) -> None:
    async def run(*words: str) -> tuple[int, str]:
        env = {"DATABASE_URL": nexhb.database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "PATH": "/usr/bin"}
        done = await asyncio.to_thread(
            forks.run, "nexhb", ["devices", *words], env=env, stderr=subprocess.STDOUT, timeout=SOON_S
        )
        return done.returncode, done.stdout

    file = str(csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\nkiosk-1,{TOKENS[1]}\n"))
    assert await run("import", file) == (0, "2 rows: 2 devices added, 2 tokens added.\n")
    assert await run("revoke", "kiosk-0") == (0, "kiosk-0 is revoked.\n")
    await becomes(410, sending(nexhb, "kiosk-0", TOKENS[0], now))
    code, output = await run("import", file)
    assert code == 0
    assert output.splitlines() == [
        "2 rows: 0 devices added, 0 tokens added.",
        "1 of the rows name revoked devices, which receive 410 until `nexhb devices readmit`.",
    ]
    code, output = await run("import", file, "--json")
    assert (code, orjson.loads(output)) == (
        0, {"rows": 2, "devices_made": 0, "tokens_added": 0, "rows_of_revoked": 1},
    )  # fmt: skip
    assert await run("readmit", "kiosk-0") == (0, "kiosk-0 is readmitted: 1 of its tokens work.\n")
    await becomes(200, sending(nexhb, "kiosk-0", TOKENS[0], now))
    code, output = await run("readmit", "kiosk-0", "--json")
    assert (code, orjson.loads(output)) == (
        0, {"device_id": "kiosk-0", "revoked": False, "was_revoked": False, "tokens": 1},
    )  # fmt: skip
    await conn.execute("DELETE FROM device_tokens")
    assert await run("readmit", "kiosk-0") == (
        0, "kiosk-0 is not revoked: 0 of its tokens work. `nexhb devices rotate` gives it one.\n",
    )  # fmt: skip
    code, output = await run("readmit", "kiosk-7")
    assert (code, "'kiosk-7'" in output) == (1, True)


# ---- the whole store, read again ------------------------------------------------------------------------------------


async def test_a_store_read_in_pieces_has_every_token_and_drops_deleted_ones(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store also has to learn of changes that caused no notification, such as those during a time without a
    connection."""
    monkeypatch.setattr(device_store, "ROWS_PER_FETCH", 2)
    tokens = {name: device_tokens.hash_token(await registry.add(conn, name, None)) for name in "abcde"}
    store = device_store.DeviceStore(database, refresh_s=60)
    await store.load()
    assert [device.device_id for name in "abcde" if (device := store.cached(tokens[name]))] == list("abcde")
    await conn.execute("SET session_replication_role = replica")
    await registry.revoke(conn, "b", now)
    await registry.rotate(conn, "c")
    tokens["f"] = device_tokens.hash_token(await registry.add(conn, "f", None))
    await store.load()
    known = {name: store.cached(token_hash) for name, token_hash in tokens.items()}
    assert {name: device.revoked for name, device in known.items() if device} == {
        "a": False, "b": True, "d": False, "e": False, "f": False,
    }  # fmt: skip


async def test_heartbeats_are_served_while_the_store_is_read(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is read in several fetches; between two of them, the event loop handles requests."""
    monkeypatch.setattr(device_store, "ROWS_PER_FETCH", 1)
    for name in "abcdefgh":
        await registry.add(conn, name, None)
    store = device_store.DeviceStore(database, refresh_s=60)
    loading = asyncio.create_task(store.load())
    known = set()
    while not loading.done():
        known.add(len(store._by_hash))
        await asyncio.sleep(0)
    await loading
    assert len(known) > 3


# ---- when notifications do not arrive --------------------------------------------------------------------------------

LISTENER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb devices' ORDER BY backend_start DESC"
LISTENS = ("nexhb_device_refreshes_total", {"why": "listen", "status": "ok"})


@asynccontextmanager
async def followed(database: Database, refresh_s: float) -> AsyncIterator[device_store.DeviceStore]:
    """Provide a store that already listens, and reads everything again every refresh_s."""
    store = device_store.DeviceStore(database, refresh_s=refresh_s)
    before = REGISTRY.get_sample_value(*LISTENS) or 0
    following = asyncio.create_task(store.run())
    try:
        async with asyncio.timeout(SOON_S):
            while (REGISTRY.get_sample_value(*LISTENS) or 0) == before:
                await asyncio.sleep(0.01)
        yield store
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()


async def test_a_lost_listener_is_replaced_and_missed_changes_are_read(
    database: Database, conn: Connection, now: datetime
) -> None:
    """Formerly, the loss was noticed only by the next refresh, minutes later, and a revoked device was accepted until
    then."""
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=3600) as store:
        pid = await conn.fetchval(LISTENER)
        async with conn.transaction():
            await registry.revoke(conn, "kiosk-1", now)
            await conn.execute("SELECT pg_terminate_backend($1)", pid)
            async with database.connected(application="test") as other, asyncio.timeout(60):
                while await other.fetchval(LISTENER) == pid:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)


async def test_the_next_refresh_makes_up_for_a_lost_notification(
    database: Database, conn: Connection, now: datetime
) -> None:
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=0.05) as store:
        await conn.execute("SET session_replication_role = replica")  # no trigger, and so no notification
        await registry.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)


async def test_the_number_of_remembered_unknown_tokens_is_limited(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "MAX_MISSES", 10)
    monkeypatch.setattr(device_store, "MISS_TTL_S", 3600.0)
    store = device_store.DeviceStore(database, refresh_s=3600)
    for number in range(25):
        assert await store.look_up(device_tokens.hash_token(f"stray {number}")) is None
    assert len(store._misses) == 10
    await store.close()


async def test_a_look_up_whose_connection_was_terminated_uses_a_new_one(database: Database, conn: Connection) -> None:
    store = device_store.DeviceStore(database, refresh_s=3600)
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    assert await store.look_up(device_tokens.hash_token("stray")) is None
    lookup_conn = await store._lookup_conn.get()
    await conn.execute("SELECT pg_terminate_backend($1)", lookup_conn.get_server_pid())
    for _ in range(3):
        with suppress(DatabaseUnavailable):
            await store.look_up(token)
    device = store.cached(token)
    assert device is not None
    assert device.device_id == "kiosk-1"
    await store.close()


async def test_an_unknown_token_is_looked_up_again_while_the_listener_is_down(
    database: Database, conn: Connection
) -> None:
    """Formerly, a device that was added after its first 401 received 401 for two more seconds while the listener was
    down."""
    store = device_store.DeviceStore(database, refresh_s=300)
    await store.load()
    try:
        token = device_tokens.new_token()
        assert await store.look_up(device_tokens.hash_token(token)) is None
        await registry.add(conn, "kiosk-1", None)
        await conn.execute("UPDATE device_tokens SET token_sha256 = $1", device_tokens.hash_token(token))
        device = await store.look_up(device_tokens.hash_token(token))
        assert device is not None
        assert device.device_id == "kiosk-1"
    finally:
        await store.close()


# ---- a listener that freezes, at any of its queries ------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenAtFirst(Database):
    """A database whose first session freezes as soon as it is opened."""

    frozen: list[int] = field(default_factory=list, compare=False)

    async def connect(self, **how: Any) -> Connection:
        """Connect; the first connection gets no response to any query."""
        conn = await super().connect(**how)
        if not self.frozen:
            freeze(conn, self.frozen)
        return conn


def freeze(conn: Connection, frozen: list[int]) -> None:
    """Stop the connection's backend and note its pid."""
    frozen.append(conn.get_server_pid())
    os.kill(frozen[0], signal.SIGSTOP)


def freezes_in(store: device_store.DeviceStore, step: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the listener's backend freeze when this step first begins; return a list that then contains its pid."""
    original, frozen = getattr(store, step), list[int]()

    def frozen_at_first(*args: Any) -> Any:
        if store._follow_conn is not None and not frozen:
            freeze(store._follow_conn, frozen)
        return original(*args)

    monkeypatch.setattr(store, step, frozen_at_first)
    return frozen


@pytest.mark.parametrize("step", ["add_listener", "_read_all", "_cache", "the end", "_apply_notification"])
async def test_a_listener_whose_connection_stalls_at_any_query_is_replaced_within_seconds(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Formerly, only the query for the count of changes had a timeout: while the listener hung at another query, a
    revoked device was accepted."""
    monkeypatch.setattr(device_store, "RESPONSE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(device_store, "POLL_S", 3600.0)
    if step == "_cache":  # with more rows per fetch, one fetch would read everything, and COMMIT would come next
        monkeypatch.setattr(device_store, "ROWS_PER_FETCH", 1)
        await registry.add(conn, "kiosk-0", None)
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    where = FrozenAtFirst(database.dsn) if step == "add_listener" else database
    store = device_store.DeviceStore(where, refresh_s=3600)
    frozen = (
        where.frozen
        if isinstance(where, FrozenAtFirst)
        else freezes_in(store, step.replace("the end", "_cache"), monkeypatch)
    )
    following = asyncio.create_task(store.run())
    try:
        async with asyncio.timeout(SOON_S):
            while not store._is_following and not frozen:
                await asyncio.sleep(0.01)
        await registry.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not ((device := store.cached(token)) and device.revoked):
                await asyncio.sleep(0.01)
        assert frozen
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_look_up_without_a_response_does_not_hold_up_the_next(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, every token that was not in memory received 503 for as long as the one session for lookups was
    frozen."""
    monkeypatch.setattr(device_store, "LOOKUP_TIMEOUT_S", 1.0)
    store, frozen = device_store.DeviceStore(database, refresh_s=3600), list[int]()
    assert await store.look_up(device_tokens.hash_token("stray")) is None
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    freeze(await store._lookup_conn.get(), frozen)
    try:
        with pytest.raises(DatabaseUnavailable):
            await store.look_up(token)
        monkeypatch.setattr(device_store, "LOOKUP_TIMEOUT_S", SOON_S)
        assert await store.look_up(token)
    finally:
        os.kill(frozen[0], signal.SIGCONT)
        await store.close()


# ---- counts of changes, and a database that is replaced --------------------------------------------------------------


async def token_changes(conn: Connection) -> int:
    """Return how often tokens have changed."""
    return int(await conn.fetchval("SELECT sum(changes) FROM device_token_changes"))


async def test_every_read_of_tokens_remembers_the_count_of_changes(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy whose count of changes is lower than the highest count read is an older copy, so every read of tokens must
    remember the count."""
    monkeypatch.setattr(device_store, "POLL_S", 3600.0)
    tracker = identity.DatabaseTracker()
    store = device_store.DeviceStore(database, refresh_s=3600, tracker=tracker)
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    await store.load()
    assert tracker._changes == await token_changes(conn) > 0
    token = device_tokens.hash_token(await registry.rotate(conn, "kiosk-1"))
    assert await store.look_up(token)
    assert tracker._changes == await token_changes(conn)
    before = REGISTRY.get_sample_value(*LISTENS) or 0
    following = asyncio.create_task(store.run())
    async with asyncio.timeout(SOON_S):
        while (REGISTRY.get_sample_value(*LISTENS) or 0) == before:
            await asyncio.sleep(0.01)
        await registry.revoke(conn, "kiosk-1", now)
        while not ((device := store.cached(token)) and device.revoked):
            await asyncio.sleep(0.01)
    assert tracker._changes == await token_changes(conn)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await store.close()


async def test_a_change_that_was_notified_does_not_count_as_missed(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise half a million tokens would be read again for each one that changes."""
    monkeypatch.setattr(device_store, "POLL_S", 0.01)
    missed = ("nexhb_device_refreshes_total", {"why": "missed", "status": "ok"})
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=3600) as store:
        before = REGISTRY.get_sample_value(*missed) or 0
        await registry.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)
        polls, original = 0, store._is_behind

        async def poll(listener: Connection) -> bool:
            nonlocal polls
            polls += 1
            return await original(listener)

        monkeypatch.setattr(store, "_is_behind", poll)
        async with asyncio.timeout(SOON_S):
            while polls < 5:
                await asyncio.sleep(0.01)
        assert (REGISTRY.get_sample_value(*missed) or 0) == before


async def test_tokens_read_while_the_database_is_replaced_are_discarded(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a database is replaced, the connection is terminated, but a response may have arrived just before that."""
    tracker = identity.DatabaseTracker()
    store = device_store.DeviceStore(database, refresh_s=3600, tracker=tracker)
    token = device_tokens.hash_token(await registry.add(conn, "kiosk-1", None))
    [row] = await conn.fetch(sql.queries("devices")["find_tokens"], [token])

    async def replaced(*_: object) -> list[Any]:
        tracker.epoch += 1
        return [row]

    stub: Any = SimpleNamespace(fetch=replaced, is_closed=lambda: False, terminate=lambda: None)
    store._lookup_conn._conn = stub
    with pytest.raises(DatabaseUnavailable):
        await store.look_up(token)
    with pytest.raises(DatabaseUnavailable):
        await store._apply_notification(stub, token.hex())
    assert store.cached(token) is None
    original = device_store._fetch_rows
    for last in (False, True):

        async def fetch_rows(listener: Connection, cursor: Any, last: bool = last) -> list[Any]:
            rows = await original(listener, cursor)
            if last != bool(rows):
                tracker.epoch += 1
            return rows

        monkeypatch.setattr(device_store, "_fetch_rows", fetch_rows)
        async with database.connected(application="test") as reader:
            with pytest.raises(DatabaseUnavailable):
                await store._read_all(reader, "refresh")
        assert last or store.cached(token) is None


async def test_a_token_unknown_to_the_previous_database_is_looked_up_again(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "MISS_TTL_S", 3600.0)
    store = device_store.DeviceStore(database, refresh_s=3600)
    store._is_following = True
    token = device_tokens.hash_token(device_tokens.new_token())
    assert await store.look_up(token) is None
    await registry.add(conn, "kiosk-1", None)
    await conn.execute("UPDATE device_tokens SET token_sha256 = $1", token)
    assert await store.look_up(token) is None
    store._clear()
    store._is_following = True  # the end of the listener is noticed a moment later
    assert await store.look_up(token)
    await store.close()
