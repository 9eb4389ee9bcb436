"""Who may send: added, rotated, revoked, imported, enrolled; and every daemon knows it at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
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

from nexhb import devices, identity, sql
from nexhb.config import Auth
from nexhb.db import Connection, Database
from nexhb.errors import BadInput, DatabaseUnavailable, DeviceExists, UnknownDevice
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Answer, Nexhb, StartDaemon

Sending = Callable[[], Coroutine[Any, Any, Answer]]


async def becomes(wanted: int, ask: Sending) -> None:
    """Ask until this status is the answer."""
    status = 0
    try:
        async with asyncio.timeout(SOON_S):
            while status != wanted:
                status = (await ask()).status
    except TimeoutError:
        pytest.fail(f"after {SOON_S} s the answer is still {status}, not {wanted}")


def sending(nexhb: Nexhb, device_id: str, token: str, made_at: datetime) -> Sending:
    """One heartbeat with this token to this daemon, as often as it is called."""
    return lambda: Agent(nexhb, device_id, token).live(made_at)


@pytest.fixture
async def both(start_daemon: StartDaemon) -> list[Nexhb]:
    """Two daemons on one database."""
    return [await start_daemon(), await start_daemon()]


# ---- add, rotate, revoke ----------------------------------------------------------------------------------------


async def test_a_new_devices_token_works_at_once_in_every_daemon(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await devices.add(conn, "kiosk-1", "Store 42")
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200
    assert (await both[0].get("/v1/devices/kiosk-1"))["device_id"] == "kiosk-1"


async def test_a_token_that_was_just_refused_works_as_soon_as_it_is_added(
    both: list[Nexhb], conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown token is remembered for a while; the notice of its coming ends that, not the while."""
    monkeypatch.setattr(devices, "MISS_HOLDS_S", 60.0)
    token = devices.new_token()
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 401
    monkeypatch.setattr(devices, "new_token", lambda: token)
    await devices.add(conn, "kiosk-1", None)
    for nexhb in both:
        await becomes(200, sending(nexhb, "kiosk-1", token, now))


async def test_rotation_ends_the_old_token_and_starts_the_new_one_in_every_daemon(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    old = await devices.add(conn, "kiosk-1", None)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", old, now)()).status == 200
    new = await devices.rotate(conn, "kiosk-1")
    assert new != old
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
        await becomes(401, sending(nexhb, "kiosk-1", old, now))
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_a_revoked_device_hears_410_in_every_daemon_and_is_admitted_again_by_rotation(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await devices.add(conn, "kiosk-1", None)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200
    await devices.revoke(conn, "kiosk-1", now)
    for nexhb in both:
        await becomes(410, sending(nexhb, "kiosk-1", token, now))
    new = await devices.rotate(conn, "kiosk-1")
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", new, now)()).status == 200
        await becomes(401, sending(nexhb, "kiosk-1", token, now))
    assert await conn.fetchval("SELECT revoked_at FROM devices") is None
    assert (await both[0].get("/v1/devices/kiosk-1"))["status"] == "ok"


async def test_a_readmitted_device_goes_on_with_its_own_token_in_every_daemon(
    both: list[Nexhb], conn: Connection, now: datetime
) -> None:
    token = await devices.add(conn, "kiosk-1", None)
    made_at = now - timedelta(hours=1)
    for nexhb in both:
        assert (await sending(nexhb, "kiosk-1", token, made_at)()).status == 200
    await devices.revoke(conn, "kiosk-1", now)
    for nexhb in both:
        await becomes(410, sending(nexhb, "kiosk-1", token, made_at))
        assert await offline(nexhb) == []
    assert await devices.readmit(conn, "kiosk-1") == devices.Readmitted(was_revoked=True, tokens=1)
    for nexhb in both:
        await becomes(200, sending(nexhb, "kiosk-1", token, made_at))
        assert await offline(nexhb) == ["kiosk-1"]
        assert (await nexhb.get("/v1/devices/kiosk-1"))["status"] == "ok"


async def offline(nexhb: Nexhb) -> list[str]:
    """Whom this daemon lists as silent."""
    return [device["device_id"] for device in (await nexhb.get("/v1/devices/offline"))["devices"]]


async def test_a_token_that_was_revoked_on_its_own_stays_revoked(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    own = await devices.add(conn, "kiosk-0", None)
    await devices.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\n"))
    await conn.execute(
        "UPDATE device_tokens SET revoked_at = $2 WHERE token_sha256 = $1",
        devices.hash_token(TOKENS[0]), now - timedelta(seconds=1),
    )  # fmt: skip
    neighbour = await devices.add(conn, "kiosk-1", None)
    for device_id in ("kiosk-0", "kiosk-1"):
        await devices.revoke(conn, device_id, now)  # at the same time
    await devices.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[1]}\n"))
    assert await devices.readmit(conn, "kiosk-0") == devices.Readmitted(was_revoked=True, tokens=2)
    for token, status in ((own, 200), (TOKENS[1], 200), (TOKENS[0], 410)):
        await becomes(status, sending(nexhb, "kiosk-0", token, now))
    await becomes(410, sending(nexhb, "kiosk-1", neighbour, now))


async def test_a_device_that_was_revoked_twice_is_readmitted_as_one_that_was_once(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The second time has no token to take: did it count, none would come back."""
    token = await devices.add(conn, "kiosk-1", None)
    for after_s in (0, 60):
        await devices.revoke(conn, "kiosk-1", now + timedelta(seconds=after_s))
    assert await conn.fetchval("SELECT revoked_at FROM devices") == now
    assert (await devices.readmit(conn, "kiosk-1")).tokens == 1
    await becomes(200, sending(nexhb, "kiosk-1", token, now))


async def test_a_readmission_of_a_device_that_is_not_revoked_changes_nothing(conn: Connection, now: datetime) -> None:
    await devices.add(conn, "kiosk-1", None)
    everything = (
        "SELECT d.xmin, d.revoked_at, t.xmin, t.revoked_at FROM devices d JOIN device_tokens t USING (device_no)"
    )
    for revoked_at, tokens in ((None, 1), (now, 0)):  # even where its token was revoked on its own
        await conn.execute("UPDATE device_tokens SET revoked_at = $1", revoked_at)
        before = await conn.fetch(everything)
        assert await devices.readmit(conn, "kiosk-1") == devices.Readmitted(was_revoked=False, tokens=tokens)
        assert await conn.fetch(everything) == before


async def test_a_readmission_waits_for_a_change_that_is_under_way(
    database: Database, conn: Connection, now: datetime
) -> None:
    await devices.add(conn, "kiosk-1", None)
    other = await database.connect(application="test", lock_timeout="5000")
    try:
        async with conn.transaction():
            await devices.revoke(conn, "kiosk-1", now)
            readmitting = asyncio.create_task(devices.readmit(other, "kiosk-1"))
            waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = $1"
            async with asyncio.timeout(SOON_S):
                while not await conn.fetch(waits, other.get_server_pid()):
                    assert not readmitting.done()
        assert await readmitting == devices.Readmitted(was_revoked=True, tokens=1)
    finally:
        other.terminate()


async def test_a_daemon_that_starts_later_knows_a_revoked_device_from_an_unknown_one(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    token = await devices.add(conn, "kiosk-1", None)
    await devices.revoke(conn, "kiosk-1", now)
    nexhb = await start_daemon()
    assert (await sending(nexhb, "kiosk-1", token, now)()).status == 410
    assert (await sending(nexhb, "kiosk-1", devices.new_token(), now)()).status == 401


async def test_revoked_devices_are_neither_offline_nor_down_nor_counted(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agents = [await nexhb.agent(f"kiosk-{number}") for number in range(3)]
    for agent in agents:
        assert (await agent.live(now - timedelta(hours=1), unity_process_running=False)).status == 200
    await nexhb.agent("never-seen")

    async def told() -> tuple[dict[str, Any], list[str], list[str]]:
        lists = [await nexhb.get(f"/v1/devices/{which}") for which in ("offline", "unity-down")]
        for one in lists:
            assert one["count"] == len(one["devices"])
        names = [sorted(device["device_id"] for device in one["devices"]) for one in lists]
        return await nexhb.get("/v1/fleet"), names[0], names[1]

    counts = ("devices", "online", "offline", "unity_down", "never_seen")
    fleet, offline, down = await told()
    assert [fleet[name] for name in counts] == [4, 0, 3, 3, 1]
    assert offline == down == ["kiosk-0", "kiosk-1", "kiosk-2"]
    await devices.revoke(conn, "kiosk-1", now)
    await devices.revoke(conn, "never-seen", now)
    fleet, offline, down = await told()
    assert [fleet[name] for name in counts] == [2, 0, 2, 2, 0]
    assert offline == down == ["kiosk-0", "kiosk-2"]
    listed = {row["device_id"]: row["status"] for row in (await nexhb.get("/v1/devices"))["devices"]}
    assert listed == {"kiosk-0": "ok", "kiosk-1": "revoked", "kiosk-2": "ok", "never-seen": "revoked"}
    await devices.rotate(conn, "kiosk-1")
    fleet, offline, down = await told()
    assert [fleet[name] for name in counts] == [3, 0, 3, 3, 0]
    assert offline == down == ["kiosk-0", "kiosk-1", "kiosk-2"]


async def test_an_id_that_is_taken_or_unknown_or_unfit_is_refused_and_changes_nothing(conn: Connection) -> None:
    await devices.add(conn, "kiosk-1", None)
    with pytest.raises(DeviceExists, match="'kiosk-1' is taken"):
        await devices.add(conn, "kiosk-1", "again")
    for refused in (
        devices.rotate(conn, "kiosk-2"),
        devices.revoke(conn, "kiosk-2", datetime.now(UTC)),
        devices.readmit(conn, "kiosk-2"),
    ):
        with pytest.raises(UnknownDevice, match="'kiosk-2'"):
            await refused
    for device_id in ("", "x" * 101, "a\0b", "a\nb"):
        with pytest.raises(BadInput, match="device_id takes 1 to 100 printable characters"):
            await devices.add(conn, device_id, None)
    with pytest.raises(BadInput, match="alias takes 1 to 200"):
        await devices.add(conn, "kiosk-3", "x" * 201)
    assert [tuple(row) for row in await conn.fetch("SELECT device_id, alias FROM devices")] == [("kiosk-1", None)]
    assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1


async def test_devices_are_listed_page_by_page(conn: Connection) -> None:
    for number in range(5):
        await devices.add(conn, f"kiosk-{number}", None)
    first = await devices.page(conn, "", 3)
    second = await devices.page(conn, first[-1]["device_id"], 3)
    assert [row["device_id"] for row in (*first, *second)] == [f"kiosk-{number}" for number in range(5)]


async def test_only_the_sha256_of_a_token_or_key_is_stored(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    secrets = [await devices.add(conn, "kiosk-1", None), await devices.add(conn, "kiosk-2", None)]
    secrets.append(await devices.rotate(conn, "kiosk-2"))
    secrets.append(
        await devices.issue_enrolment_key(conn, note="n", uses=2, expires_at=datetime.now(UTC) + timedelta(hours=1))
    )
    secrets.append((await devices.enrol(conn, secrets[-1], "kiosk-3", None, datetime.now(UTC)))[1])
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


# ---- a change is in force within seconds, whatever becomes of the listener ------------------------------------------

FOLLOWER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb devices' AND datname = current_database()"


async def test_a_change_whose_notification_is_lost_is_in_force_within_seconds(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """It was in force with the next whole reading of the store, after auth.refresh_seconds."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    listener = (await nexhb.rows(FOLLOWER))[0]["pid"]
    os.kill(listener, signal.SIGSTOP)  # it is not read what is notified, and nothing is answered
    try:
        await devices.revoke(conn, agent.device_id, now)
        await becomes(410, sending(nexhb, agent.device_id, agent.token, now))
    finally:
        os.kill(listener, signal.SIGCONT)


async def test_a_change_that_is_counted_and_not_notified_is_seen(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """As with a listener that lost its place."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    async with conn.transaction():
        await conn.execute("SET LOCAL session_replication_role = replica")  # no trigger, and so no notification
        await devices.revoke(conn, agent.device_id, now)
        await conn.execute("INSERT INTO device_token_changes VALUES (-1, 1)")
    await becomes(410, sending(nexhb, agent.device_id, agent.token, now))


async def test_a_cancelled_statement_of_the_listener_costs_one_connection(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The end of the one connection was taken for the end of the next, and so on, every 5 s for ever."""
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_token_changes IN ACCESS EXCLUSIVE MODE")  # at this it waits
        listener = await waits(nexhb)
        await conn.execute("SELECT pg_cancel_backend($1)", listener)
        async with asyncio.timeout(SOON_S):
            while listener in [row["pid"] for row in await nexhb.rows(FOLLOWER)]:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(SOON_S):
        while not (found := await nexhb.rows(FOLLOWER + " AND state = 'idle'")):
            await asyncio.sleep(0.01)
    await devices.revoke(conn, agent.device_id, now)
    await becomes(410, sending(nexhb, agent.device_id, agent.token, now))
    looks = FOLLOWER + " AND query_start > $1 AND pid = $2"
    for _ in range(3):  # and looks again and again, on one connection
        since = await conn.fetchval("SELECT clock_timestamp()")
        async with asyncio.timeout(SOON_S):
            while not await nexhb.rows(looks, since, found[0]["pid"]):
                await asyncio.sleep(0.05)


async def waits(nexhb: Nexhb) -> int:
    """The listener's backend, once it waits for a lock."""
    async with asyncio.timeout(SOON_S):
        while not (found := await nexhb.rows(FOLLOWER + " AND wait_event_type = 'Lock'")):
            await asyncio.sleep(0.01)
    return int(found[0]["pid"])


# ---- nobody hears 401 unread ------------------------------------------------------------------------------------


async def test_a_token_that_came_without_notice_is_found_in_the_store(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    await conn.execute("ALTER TABLE device_tokens DISABLE TRIGGER USER")
    token = await devices.add(conn, "kiosk-1", None)
    assert (await sending(nexhb, "kiosk-1", token, now)()).status == 200


async def test_an_unknown_token_is_answered_only_when_the_store_was_read(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    token = devices.new_token()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_tokens IN ACCESS EXCLUSIVE MODE")
        answer = asyncio.create_task(sending(nexhb, "kiosk-1", token, now)())
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%device_tokens%'"
        async with asyncio.timeout(SOON_S):
            while not (await nexhb.rows(waits))[0][0]:
                assert not answer.done()
        device_no = await conn.fetchval("INSERT INTO devices (device_id) VALUES ('kiosk-1') RETURNING device_no")
        await conn.execute("INSERT INTO device_tokens VALUES ($1, $2)", devices.hash_token(token), device_no)
        assert not answer.done()
    assert (await answer).status == 200  # the store that it was looked up in had it


async def test_an_unknown_token_costs_one_look_up_and_not_one_a_heartbeat(
    nexhb: Nexhb, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MISS_HOLDS_S", 60.0)
    token = devices.new_token()
    assert (await sending(nexhb, "stray", token, now)()).status == 401
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_tokens IN ACCESS EXCLUSIVE MODE")  # a second look-up would hang here
        for _ in range(20):
            assert (await asyncio.wait_for(sending(nexhb, "stray", token, now)(), SOON_S)).status == 401


# ---- import -----------------------------------------------------------------------------------------------------


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str], Path]:
    """A file with this text."""

    def write(text: str) -> Path:
        file = tmp_path / "devices.csv"
        file.write_text(text, encoding="utf-8")
        return file

    return write


TOKENS = [f"token-{number}-of-an-old-system-0123456789" for number in range(6)]


async def stored(conn: Connection) -> set[tuple[str, str | None, bytes]]:
    """Devices with their tokens."""
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
    assert await devices.import_csv(conn, file) == devices.Imported(rows=4, devices_made=4, tokens_added=4)
    aliases = ["Store 42, by the door", None, "Straße", None]
    assert await stored(conn) == {
        (f"kiosk-{n}", alias, devices.hash_token(TOKENS[n])) for n, alias in enumerate(aliases)
    }
    for number in range(4):
        assert (await sending(nexhb, f"kiosk-{number}", TOKENS[number], now)()).status == 200


WORLD = ["渋谷店\u30003号機", "فروشگاه می\u200cدان", "Магазин 7", "חנות\u200f 7"]  # noqa: RUF001


async def test_the_names_that_heartbeats_may_have_operators_may_give(
    open_house: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path], tmp_path: Path
) -> None:
    """An ideographic space or a zero-width non-joiner was refused by import, add and register, with the whole file."""
    key = await devices.issue_enrolment_key(conn, note=WORLD[0], uses=10, expires_at=now + timedelta(days=1))
    body = "".join(f"{name}-i;{name};{'i' * 40}{n}\r\n" for n, name in enumerate(WORLD))
    file = csv("Device ID;Alias;Token\r\n;;\r\n" + body)
    assert await devices.import_csv(conn, file) == devices.Imported(4, 4, 4)
    for name in WORLD:
        await devices.add(conn, f"{name}-a", name)
        assert (await register(open_house, key, f"{name}-r", alias=name)).status == 200
        assert (await (await open_house.agent(f"{name}-h")).send(now, alias=name)).status == 200
    listed = (await open_house.get("/v1/devices"))["devices"]
    assert {(row["device_id"], row["alias"]) for row in listed} == {(f"{n}-{way}", n) for n in WORLD for way in "iarh"}
    listing = await asyncio.create_subprocess_exec(
        ".venv/bin/python", "-m", "nexhb", "devices", "list",
        env={"DATABASE_URL": open_house.database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "COLUMNS": "20", "LANG": "C"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    lines = (await asyncio.wait_for(listing.communicate(), SOON_S))[0].decode().splitlines()
    assert lines[0] == "device_id\tname\talias\tmodel\tlast heartbeat\trevoked"
    found = sorted(line.split("\t")[0:3:2] for line in lines[1:])
    assert found == sorted([row["device_id"], row["alias"]] for row in listed)
    for name in ("a\tb", "a\u2028b", "a\u202eb", "a\ud83d"):
        with pytest.raises(BadInput, match=r"and U\+[0-9A-F]{4} is none"):
            await devices.add(conn, name, None)


async def test_every_bad_line_of_a_file_is_named_up_to_twenty(conn: Connection, csv: Callable[[str], Path]) -> None:
    bad = "".join(f"kiosk-{n},a\u2028b,{'x' * 40}{n}\n" for n in range(25))
    with pytest.raises(BadInput) as refused:
        await devices.import_csv(conn, csv(f"device_id,alias,token\ngood,,{TOKENS[0]}\n{bad}last,,short\n"))
    assert [f"line {n}: " in str(refused.value) for n in (2, 3, 22, 23)] == [False, True, True, False]
    assert "and 6 lines more. Nothing was imported." in str(refused.value)
    assert await stored(conn) == set()


async def test_a_second_import_changes_nothing(conn: Connection, csv: Callable[[str], Path]) -> None:
    file = csv("\ufeffdevice_id,token\n" + "".join(f"kiosk-{n},{TOKENS[n]}\n" for n in range(3)))
    assert await devices.import_csv(conn, file) == devices.Imported(3, 3, 3)
    before = await stored(conn)
    assert await devices.import_csv(conn, file) == devices.Imported(3, 0, 0)
    assert await stored(conn) == before


async def test_a_known_device_keeps_its_number_its_token_and_its_alias_where_none_is_given(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    own = await devices.add(conn, "kiosk-0", "Store 42")
    device_no = await conn.fetchval("SELECT device_no FROM devices")
    assert await devices.import_csv(conn, csv(f"device_id,alias,token\nkiosk-0,,{TOKENS[0]}\n")) == devices.Imported(
        1, 0, 1
    )
    [row] = await conn.fetch("SELECT device_no, alias FROM devices")
    assert tuple(row) == (device_no, "Store 42")
    for token in (own, TOKENS[0]):
        assert (await sending(nexhb, "kiosk-0", token, now)()).status == 200


async def test_rows_of_revoked_devices_are_counted(conn: Connection, now: datetime, csv: Callable[[str], Path]) -> None:
    file = csv("device_id,token\n" + "".join(f"kiosk-{n},{TOKENS[n]}\n" for n in range(3)))
    assert await devices.import_csv(conn, file) == devices.Imported(3, 3, 3, 0)
    for revoked in (1, 2):
        await devices.revoke(conn, f"kiosk-{revoked}", now)
        assert await devices.import_csv(conn, file) == devices.Imported(3, 0, 0, revoked)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[1]}\na,{TOKENS[2]}\n", "line 4 (a): its device_id stands twice"),
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[0]}\n", "line 3 (b): its token stands twice in the file"),
        (f"device_id,token\na,{TOKENS[0]}\nb,{TOKENS[5]}\n", "line 3 (b): its token belongs to another device"),
        (f"device_id,token\na,{TOKENS[0]}\n,{TOKENS[1]}\n", "line 3: device_id takes 1 to 100"),
        (f"device_id,token\na,{TOKENS[0]}\n{'x' * 101},{TOKENS[1]}\n", "line 3: device_id takes 1 to 100"),
        (f"device_id,alias,token\na,,{TOKENS[0]}\nb,{'x' * 201},{TOKENS[1]}\n", "line 3: alias takes 1 to 200"),
        (f"device_id,token\na,{TOKENS[0]}\nb,short\n", "line 3: a token has 32 characters or more"),
        (f"device_id,token\na,{TOKENS[0]}\nb\n", "line 3: takes a token, or its SHA-256"),
        (f"device_id,token_sha256\na,{'ab' * 31}\n", "line 2: takes a token, or its SHA-256 as 64 hexadecimal digits"),
        (f"device_id,token_sha256\na,{'xy' * 32}\n", "line 2: takes a token, or its SHA-256"),
        (f'device_id,token\na,"{TOKENS[0]}\n', "unexpected end of data"),
        (f"id,token\na,{TOKENS[0]}\n", "the first line must name"),
        ("device_id,alias\na,b\n", "the first line must name"),
        ("", "the first line must name"),
    ],
)
async def test_a_bad_line_is_named_and_nothing_is_imported(
    conn: Connection, csv: Callable[[str], Path], text: str, says: str
) -> None:
    await devices.import_csv(conn, csv(f"device_id,token\nmine,{TOKENS[5]}\n"))
    before = await stored(conn)
    with pytest.raises(BadInput) as caught:
        await devices.import_csv(conn, csv(text))
    assert says in str(caught.value)
    assert await stored(conn) == before
    assert await conn.fetchval("SELECT count(*) FROM devices") == 1


async def test_twenty_thousand_devices_are_imported_by_a_few_statements_beside_a_running_daemon(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    """Half a second on a quiet machine; row by row, it would be minutes."""
    tokens = [f"{number:05d}-{'t' * 40}" for number in range(20_000)]
    lines = [f"kiosk-{number},Store {number},{token}" for number, token in enumerate(tokens)]
    file = csv("device_id,alias,token\n" + "\n".join(lines) + "\n")
    statements: list[str] = []
    with conn.query_logger(lambda logged: statements.append(logged.query)):
        assert await devices.import_csv(conn, file) == devices.Imported(20_000, 20_000, 20_000)
    assert len(statements) < 12
    # More than a notification holds: the daemon reads the whole store again.
    async with asyncio.timeout(SOON_S):
        while await nexhb.metric("nexhb_devices_known") != 20_000:
            pass
    for number in (0, 9_999, 19_999):
        assert (await sending(nexhb, f"kiosk-{number}", tokens[number], now)()).status == 200


# ---- enrolment --------------------------------------------------------------------------------------------------


@pytest.fixture
async def open_house(start_daemon: StartDaemon) -> Nexhb:
    """A daemon at which devices may register themselves."""
    return await start_daemon(auth=Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))


async def issue(nexhb: Nexhb, **wanted: Any) -> str:
    """An enrolment key, as the operator asks for one."""
    headers = {"x-admin": ADMIN_KEY, "Content-Type": "application/json"}
    url = f"{nexhb.url}/ops/enrolment-keys"
    async with nexhb.http.post(url, data=orjson.dumps(wanted), headers=headers) as response:
        body = await response.json()
        assert response.status == 200, body
        return str(body["enrolment_key"])


async def register(nexhb: Nexhb, key: str, device_id: str | None = None, **more: Any) -> Answer:
    """A device that registers itself."""
    wanted = more | ({"device_id": device_id} if device_id is not None else {})
    return await Agent(nexhb, "", key).post(orjson.dumps(wanted), "/v1/register")


async def uses_left(nexhb: Nexhb) -> int:
    """Of the only enrolment key."""
    [row] = await nexhb.rows("SELECT uses_left FROM enrolment_keys")
    return int(row["uses_left"])


async def test_a_registration_without_a_key_is_refused_before_its_body_is_read(open_house: Nexhb) -> None:
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


async def test_a_key_used_up_or_expired_or_unknown_or_missing_is_401(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(auth=Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open"), now=now)
    used_up = await issue(nexhb, uses=1)
    assert (await register(nexhb, used_up)).status == 200
    hour = await issue(nexhb, uses=9, expires_in_seconds=3600)
    nexhb.clock.fixed = now + timedelta(seconds=3599)
    assert (await register(nexhb, hour)).status == 200
    nexhb.clock.fixed = now + timedelta(seconds=3600)
    before = await nexhb.metric('nexhb_unauthorized_total{kind="enrolment"}')
    keys = (used_up, hour, devices.new_token(), "", ADMIN_KEY)
    for key in keys:
        answer = await register(nexhb, key)
        assert answer.status == 401
        assert "device_token" not in answer.body
    assert await nexhb.metric('nexhb_unauthorized_total{kind="enrolment"}') == before + len(keys)
    assert len(await nexhb.rows("SELECT FROM devices")) == 2


async def test_where_only_known_tokens_count_nobody_registers(nexhb: Nexhb) -> None:
    key = await issue(nexhb, uses=1)
    assert (await register(nexhb, key, "kiosk-1")).status == 403
    assert await nexhb.rows("SELECT FROM devices") == []
    assert await uses_left(nexhb) == 1


async def test_an_id_that_is_taken_or_unfit_does_not_spend_the_use(open_house: Nexhb) -> None:
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
    assert (agent.device_id, devices.hash_token(agent.token)) in {tuple(row) for row in known}


async def test_a_registration_whose_answer_was_lost_is_admitted_again(
    open_house: Nexhb, now: datetime, conn: Connection
) -> None:
    """It was 409 for ever: the token was in the answer, and nobody else had it."""
    key, other = await issue(open_house, uses=1), await issue(open_house, uses=5)
    lost = await register(open_house, key, "kiosk-1", alias="by the door")
    again = await register(open_house, key, "kiosk-1")
    assert (lost.status, again.status) == (200, 200)
    assert lost.body["device_token"] != again.body["device_token"]
    left = {row[0]: row[1] for row in await open_house.rows("SELECT key_sha256, uses_left FROM enrolment_keys")}
    assert (left[devices.hash_token(key)], left[devices.hash_token(other)]) == (0, 5)
    for wrong, status in ((other, 409), (devices.new_token(), 401)):
        assert (await register(open_house, wrong, "kiosk-1")).status == status
    assert (await register(open_house, key, "kiosk-2")).status == 401
    for bad in ("x" * 201, "a\u2028b"):
        assert (await register(open_house, key, "kiosk-1", alias=bad)).status == 422
    await becomes(401, sending(open_house, "kiosk-1", lost.body["device_token"], now))
    assert (await sending(open_house, "kiosk-1", again.body["device_token"], now)()).status == 200
    assert (await open_house.get("/v1/devices/kiosk-1"))["alias"] == "Store 42 - kiosk 3"
    assert (await register(open_house, key, "kiosk-1")).status == 401, "it has sent: the answer was heard"
    assert (await register(open_house, other, "kiosk-1")).status == 409
    for name, ended in (
        ("rotated", devices.rotate(conn, "rotated")),
        ("revoked", devices.revoke(conn, "revoked", now)),
    ):
        assert (await register(open_house, other, name)).status == 200
        await ended
        assert (await register(open_house, other, name)).status == 409, "the operator decides about it now"


@pytest.mark.parametrize("way", ["ConfigReceiver", "EnrollmentActivity"])
async def test_the_agent_enrols_itself_in_both_of_its_ways(open_house: Nexhb, now: datetime, way: str) -> None:
    """The agent sends its key as X-Admin-Key with the alias in the body, or as X-Admin with ?alias= and no body; nexhb
    took neither header, and refused the parameter. The agent reads device_token and device_id of a 200."""
    key, alias = await issue(open_house, uses=1), "Store 42 - kiosk 3 / ü"
    if way == "ConfigReceiver":
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
    for wrong in ({"X-Admin-Key": devices.new_token()}, {"X-Admin": ADMIN_KEY}, {"X-Admin": ""}):
        refused = open_house.http.post(f"{open_house.url}/v1/register", json={"alias": "x"}, headers=wrong)
        async with refused as response:
            assert response.status == 401
    assert await uses_left(open_house) == 0


async def test_an_agent_that_did_not_hear_the_answer_enrols_again_by_its_alias(
    open_house: Nexhb, now: datetime
) -> None:
    """The agent does not send a device_id when it enrols: a lost answer spent the only use of its key. While a key has
    uses left, the same alias may be another kiosk's: both are enrolled, and neither loses its token."""
    batch = await issue(open_house, uses=2)
    kiosks = [await register(open_house, batch, alias="Kiosk") for _ in range(2)]
    assert len({one.body["device_id"] for one in kiosks}) == 2
    assert (await register(open_house, batch, alias="Kiosk")).status == 401, "it is not clear which one"
    for one in kiosks:
        assert (await sending(open_house, one.body["device_id"], one.body["device_token"], now)()).status == 200
    key = await issue(open_house, uses=1)
    lost = await register(open_house, key, alias="by the door")
    assert (await register(open_house, key, alias="by the window")).status == 401
    assert (await register(open_house, key)).status == 401
    again = await register(open_house, key, alias="by the door")
    assert (again.status, again.body["device_id"]) == (200, lost.body["device_id"])
    await becomes(401, sending(open_house, "", lost.body["device_token"], now))
    assert (await sending(open_house, "", again.body["device_token"], now)()).status == 200
    assert (await register(open_house, key, alias="by the door")).status == 401, "it has sent: the answer was heard"


async def test_a_registration_that_is_repeated_while_the_operator_decides_waits_for_him(
    open_house: Nexhb, conn: Connection, now: datetime
) -> None:
    """The token that a rotation had just given was replaced by the device's."""
    key = await issue(open_house, uses=5)
    assert (await register(open_house, key, "kiosk-1")).status == 200
    async with conn.transaction():
        token = await devices.rotate(conn, "kiosk-1")
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
    """Also where a hand revoked it, and left the enrolment."""
    key = await issue(open_house, uses=5)
    assert (await register(open_house, key, "kiosk-1")).status == 200
    await conn.execute("UPDATE devices SET revoked_at = now()")
    assert (await register(open_house, key, "kiosk-1")).status == 409


async def test_of_devices_that_race_for_the_last_uses_exactly_so_many_win(start_daemon: StartDaemon) -> None:
    auth = Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open")
    daemons = [await start_daemon(auth=auth), await start_daemon(auth=auth)]
    for uses, racers in ((1, 2), (1, 2), (3, 8)):
        key = await issue(daemons[0], uses=uses)
        answers = await asyncio.gather(*(register(daemons[number % 2], key) for number in range(racers)))
        assert sorted(answer.status for answer in answers) == [200] * uses + [401] * (racers - uses)
    rows = await daemons[0].rows("SELECT DISTINCT uses_left FROM enrolment_keys")
    assert [row["uses_left"] for row in rows] == [0]


async def test_an_enrolment_key_is_issued_within_bounds(nexhb: Nexhb) -> None:
    agent = Agent(nexhb, "", ADMIN_KEY)
    for wanted, status in (
        ({"uses": 0}, 422),
        ({"uses": 1_000_001}, 422),
        ({"expires_in_seconds": 59}, 422),
        ({"uses": "many"}, 400),
        ({"use": 1}, 400),
    ):
        assert (await agent.post(orjson.dumps(wanted), "/ops/enrolment-keys")).status == status
    agent.token = "not the key"
    assert (await agent.post(b"{}", "/ops/enrolment-keys")).status == 401
    assert await nexhb.rows("SELECT FROM enrolment_keys") == []


# ---- found by looking for it ---------------------------------------------------------------------------------


async def test_an_import_does_not_admit_a_revoked_device(
    nexhb: Nexhb, conn: Connection, now: datetime, csv: Callable[[str], Path]
) -> None:
    await devices.add(conn, "kiosk-0", None)
    await devices.revoke(conn, "kiosk-0", now)
    try:
        await devices.import_csv(conn, csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\n"))
    except BadInput:
        return
    assert (await sending(nexhb, "kiosk-0", TOKENS[0], now)()).status == 410


async def revoked_while_its_heartbeat_waits(
    nexhb: Nexhb, conn: Connection, database: Database, made_at: datetime, *, later: bool = False
) -> None:
    """A heartbeat that is admitted from a device, its first or a later one, and committed only when the device is
    revoked."""
    agent = await nexhb.agent("kiosk-1")
    if later:
        assert (await agent.send(made_at - timedelta(minutes=1))).status == 200
    other = await database.connect(application="test")
    async with conn.transaction():
        # Before the writer's transaction, which has a label to learn.
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")
        sent = asyncio.create_task(agent.send(made_at, unity_process_running=False, app_version="2.0"))
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'nexhb writer'"
        async with asyncio.timeout(SOON_S):
            while not await nexhb.rows(waits):
                pass
        await devices.revoke(other, "kiosk-1", made_at)
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


async def test_an_import_that_is_not_utf8_is_bad_input(conn: Connection, tmp_path: Path) -> None:
    file = tmp_path / "latin1.csv"
    file.write_bytes(f"device_id,alias,token\nkiosk-0,Straße,{TOKENS[0]}\n".encode("latin-1"))
    with pytest.raises(BadInput):
        await devices.import_csv(conn, file)


async def test_an_import_whose_first_line_is_no_csv_is_bad_input(conn: Connection, csv: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput):
        await devices.import_csv(conn, csv(f'"device_id"x,token\nkiosk-0,{TOKENS[0]}\n'))


async def test_a_line_that_is_no_csv_is_named(conn: Connection, csv: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="line 3"):
        await devices.import_csv(conn, csv(f'device_id,token\na,{TOKENS[0]}\nb,"{TOKENS[1]}"x\nc,{TOKENS[2]}\n'))


async def test_an_enrolment_key_that_is_no_text_is_401(open_house: Nexhb) -> None:
    port = int(open_house.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/register HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe4\xff\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    answer = await asyncio.wait_for(reader.read(), SOON_S)
    writer.close()
    assert answer.split()[1] == b"401"


async def test_a_note_that_cannot_be_stored_is_refused(nexhb: Nexhb) -> None:
    answer = await Agent(nexhb, "", ADMIN_KEY).post(b'{"note":"a\\u0000b"}', "/ops/enrolment-keys")
    assert answer.status in (400, 422)


async def test_a_registration_that_the_database_keeps_waiting_is_503(open_house: Nexhb, conn: Connection) -> None:
    key = await issue(open_house, uses=1)
    async with conn.transaction():
        await conn.execute("LOCK TABLE enrolment_keys IN ACCESS EXCLUSIVE MODE")
        answer = await register(open_house, key, "kiosk-1")
    assert answer.status == 503
    assert "Retry-After" in answer.headers


# ---- by command -----------------------------------------------------------------------------------------------------


async def test_a_slip_is_mended_by_command(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path, csv: Callable[[str], Path]
) -> None:
    async def say(*words: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            ".venv/bin/python", "-m", "nexhb", "devices", *words,
            env={"DATABASE_URL": nexhb.database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "PATH": "/usr/bin"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), SOON_S)
        return process.returncode or 0, output.decode()

    file = str(csv(f"device_id,token\nkiosk-0,{TOKENS[0]}\nkiosk-1,{TOKENS[1]}\n"))
    assert await say("import", file) == (0, "2 rows: 2 devices made, 2 tokens added.\n")
    assert await say("revoke", "kiosk-0") == (0, "kiosk-0 is revoked.\n")
    await becomes(410, sending(nexhb, "kiosk-0", TOKENS[0], now))
    code, said = await say("import", file)
    assert code == 0
    assert said.splitlines() == [
        "2 rows: 0 devices made, 0 tokens added.",
        "1 rows are of revoked devices, which hear 410 until `nexhb devices readmit`.",
    ]
    code, said = await say("import", file, "--json")
    assert (code, orjson.loads(said)) == (
        0, {"rows": 2, "devices_made": 0, "tokens_added": 0, "rows_of_revoked": 1},
    )  # fmt: skip
    assert await say("readmit", "kiosk-0") == (0, "kiosk-0 is admitted again: 1 of its tokens work.\n")
    await becomes(200, sending(nexhb, "kiosk-0", TOKENS[0], now))
    code, said = await say("readmit", "kiosk-0", "--json")
    assert (code, orjson.loads(said)) == (
        0, {"device_id": "kiosk-0", "revoked": False, "was_revoked": False, "tokens": 1},
    )  # fmt: skip
    await conn.execute("DELETE FROM device_tokens")
    assert await say("readmit", "kiosk-0") == (
        0, "kiosk-0 is not revoked: 0 of its tokens work. `nexhb devices rotate` gives it one.\n",
    )  # fmt: skip
    code, said = await say("readmit", "kiosk-7")
    assert (code, "'kiosk-7'" in said) == (1, True)


# ---- the whole store, read again ------------------------------------------------------------------------------------


async def test_a_store_read_in_pieces_knows_all_and_forgets_who_is_gone(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what no notice told of, as after a time without a connection."""
    monkeypatch.setattr(devices, "READ_AT_ONCE", 2)
    tokens = {name: devices.hash_token(await devices.add(conn, name, None)) for name in "abcde"}
    store = devices.DeviceStore(database, refresh_s=60)
    await store.load()
    assert [found.device_id for name in "abcde" if (found := store.known(tokens[name]))] == list("abcde")
    await conn.execute("SET session_replication_role = replica")
    await devices.revoke(conn, "b", now)
    await devices.rotate(conn, "c")
    tokens["f"] = devices.hash_token(await devices.add(conn, "f", None))
    await store.load()
    known = {name: store.known(token_hash) for name, token_hash in tokens.items()}
    assert {name: device.revoked for name, device in known.items() if device} == {
        "a": False, "b": True, "d": False, "e": False, "f": False,
    }  # fmt: skip


async def test_heartbeats_are_served_while_the_store_is_read(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop comes round between two pieces."""
    monkeypatch.setattr(devices, "READ_AT_ONCE", 1)
    for name in "abcdefgh":
        await devices.add(conn, name, None)
    store = devices.DeviceStore(database, refresh_s=60)
    loading = asyncio.create_task(store.load())
    known = set()
    while not loading.done():
        known.add(len(store._by_hash))
        await asyncio.sleep(0)
    await loading
    assert len(known) > 3


# ---- when notices do not come ----------------------------------------------------------------------------------------

LISTENER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb devices' ORDER BY backend_start DESC"
LISTENS = ("nexhb_device_refreshes_total", {"why": "listen", "status": "ok"})


@asynccontextmanager
async def followed(database: Database, refresh_s: float) -> AsyncIterator[devices.DeviceStore]:
    """A store that follows by now, and reads everything again every refresh_s."""
    store = devices.DeviceStore(database, refresh_s=refresh_s)
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


async def test_a_listener_that_is_lost_is_replaced_and_what_was_missed_is_read(
    database: Database, conn: Connection, now: datetime
) -> None:
    """It was noticed by the next refresh only, minutes later, and a revoked device was taken until then."""
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=3600) as store:
        pid = await conn.fetchval(LISTENER)
        async with conn.transaction():
            await devices.revoke(conn, "kiosk-1", now)
            await conn.execute("SELECT pg_terminate_backend($1)", pid)
            async with database.connected(application="test") as other, asyncio.timeout(60):
                while await other.fetchval(LISTENER) == pid:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)


async def test_a_notice_that_is_lost_is_made_good_by_the_next_refresh(
    database: Database, conn: Connection, now: datetime
) -> None:
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=0.05) as store:
        await conn.execute("SET session_replication_role = replica")  # no trigger, and so no notice
        await devices.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)


async def test_no_more_unknown_tokens_are_remembered_than_the_bound(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MISSES_HELD", 10)
    monkeypatch.setattr(devices, "MISS_HOLDS_S", 3600.0)
    store = devices.DeviceStore(database, refresh_s=3600)
    for number in range(25):
        assert await store.find(devices.hash_token(f"stray {number}")) is None
    assert len(store._misses) == 10
    await store.close()


async def test_a_look_up_whose_connection_was_ended_is_made_on_another(database: Database, conn: Connection) -> None:
    store = devices.DeviceStore(database, refresh_s=3600)
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    assert await store.find(devices.hash_token("stray")) is None
    looked_up_by = store._lookup_conn
    assert looked_up_by is not None
    await conn.execute("SELECT pg_terminate_backend($1)", looked_up_by.get_server_pid())
    for _ in range(3):
        with suppress(DatabaseUnavailable):
            await store.find(token)
    found = store.known(token)
    assert found is not None
    assert found.device_id == "kiosk-1"
    await store.close()


async def test_a_token_that_was_unknown_is_asked_for_again_while_nobody_listens(
    database: Database, conn: Connection
) -> None:
    """A device that was added after its own 401 heard 401 once more, for two seconds, while the listener was down."""
    store = devices.DeviceStore(database, refresh_s=300)
    await store.load()
    try:
        token = devices.new_token()
        assert await store.find(devices.hash_token(token)) is None
        await devices.add(conn, "kiosk-1", None)
        await conn.execute("UPDATE device_tokens SET token_sha256 = $1", devices.hash_token(token))
        found = await store.find(devices.hash_token(token))
        assert found is not None
        assert found.device_id == "kiosk-1"
    finally:
        await store.close()


# ---- a listener that freezes, at whichever of its questions ----------------------------------------------------------


@dataclass(frozen=True)
class FrozenAtFirst(Database):
    """Its first session freezes as soon as it is made."""

    frozen: list[int] = field(default_factory=list, compare=False)

    async def connect(self, **how: Any) -> Connection:
        """The same, and nothing that it is asked is answered."""
        conn = await super().connect(**how)
        if not self.frozen:
            freeze(conn, self.frozen)
        return conn


def freeze(conn: Connection, frozen: list[int]) -> None:
    """Stop its backend."""
    frozen.append(conn.get_server_pid())
    os.kill(frozen[0], signal.SIGSTOP)


def freezes_in(store: devices.DeviceStore, step: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The listener's backend stops as this step begins, the first time; its pid."""
    plain, frozen = getattr(store, step), list[int]()

    def frozen_at_first(*args: Any) -> Any:
        if store._follow_conn is not None and not frozen:
            freeze(store._follow_conn, frozen)
        return plain(*args)

    monkeypatch.setattr(store, step, frozen_at_first)
    return frozen


@pytest.mark.parametrize("step", ["add_listener", "_read_all", "_take_in", "the end", "_take_notice"])
async def test_a_listener_that_freezes_at_any_question_is_replaced_within_seconds(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Only its look at the count of changes was known to end: a revoked device was taken for as long as it froze."""
    monkeypatch.setattr(devices, "ANSWER_S", 1.0)
    monkeypatch.setattr(devices, "LOOK_S", 3600.0)
    if step == "_take_in":  # else that was all of it, and what comes next is COMMIT
        monkeypatch.setattr(devices, "READ_AT_ONCE", 1)
        await devices.add(conn, "kiosk-0", None)
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    where = FrozenAtFirst(database.dsn) if step == "add_listener" else database
    store = devices.DeviceStore(where, refresh_s=3600)
    frozen = (
        where.frozen
        if isinstance(where, FrozenAtFirst)
        else freezes_in(store, step.replace("the end", "_take_in"), monkeypatch)
    )
    following = asyncio.create_task(store.run())
    try:
        async with asyncio.timeout(SOON_S):
            while not store._is_following and not frozen:
                await asyncio.sleep(0.01)
        await devices.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not ((device := store.known(token)) and device.revoked):
                await asyncio.sleep(0.01)
        assert frozen
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_look_up_that_is_not_answered_does_not_hold_up_the_next(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token that memory did not know was 503 for as long as that one session froze."""
    monkeypatch.setattr(devices, "LOOKUP_TIMEOUT_S", 1.0)
    store, frozen = devices.DeviceStore(database, refresh_s=3600), list[int]()
    assert await store.find(devices.hash_token("stray")) is None
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    assert store._lookup_conn is not None
    freeze(store._lookup_conn, frozen)
    try:
        with pytest.raises(DatabaseUnavailable):
            await store.find(token)
        monkeypatch.setattr(devices, "LOOKUP_TIMEOUT_S", SOON_S)
        assert await store.find(token)
    finally:
        os.kill(frozen[0], signal.SIGCONT)
        await store.close()


# ---- what is known of changes, and of which database -----------------------------------------------------------------


async def counted(conn: Connection) -> int:
    """How often tokens have changed."""
    return int(await conn.fetchval("SELECT sum(changes) FROM device_token_changes"))


async def test_every_way_to_read_tokens_remembers_how_often_they_have_changed(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that an older copy is known: a token that was read after the copy was made proves that there were changes."""
    monkeypatch.setattr(devices, "LOOK_S", 3600.0)
    lives = identity.Lives()
    store = devices.DeviceStore(database, refresh_s=3600, lives=lives)
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    await store.load()
    assert lives._changes == await counted(conn) > 0
    token = devices.hash_token(await devices.rotate(conn, "kiosk-1"))
    assert await store.find(token)
    assert lives._changes == await counted(conn)
    before = REGISTRY.get_sample_value(*LISTENS) or 0
    following = asyncio.create_task(store.run())
    async with asyncio.timeout(SOON_S):
        while (REGISTRY.get_sample_value(*LISTENS) or 0) == before:
            await asyncio.sleep(0.01)
        await devices.revoke(conn, "kiosk-1", now)
        while not ((device := store.known(token)) and device.revoked):
            await asyncio.sleep(0.01)
    assert lives._changes == await counted(conn)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await store.close()


async def test_a_change_that_was_notified_is_none_that_was_missed(
    database: Database, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a million tokens would be read again for each one that changes."""
    monkeypatch.setattr(devices, "LOOK_S", 0.01)
    missed = ("nexhb_device_refreshes_total", {"why": "missed", "status": "ok"})
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    async with followed(database, refresh_s=3600) as store:
        before = REGISTRY.get_sample_value(*missed) or 0
        await devices.revoke(conn, "kiosk-1", now)
        async with asyncio.timeout(SOON_S):
            while not store._by_hash[token].revoked:
                await asyncio.sleep(0.01)
        looks, plain = 0, store._is_behind

        async def look(listener: Connection) -> bool:
            nonlocal looks
            looks += 1
            return await plain(listener)

        monkeypatch.setattr(store, "_is_behind", look)
        async with asyncio.timeout(SOON_S):
            while looks < 5:
                await asyncio.sleep(0.01)
        assert (REGISTRY.get_sample_value(*missed) or 0) == before


async def test_what_is_read_while_the_database_is_replaced_is_not_taken_in(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is ended as well, but an answer may have come just before that."""
    lives = identity.Lives()
    store = devices.DeviceStore(database, refresh_s=3600, lives=lives)
    token = devices.hash_token(await devices.add(conn, "kiosk-1", None))
    [row] = await conn.fetch(sql.queries("devices")["find_tokens"], [token])

    async def replaced(*_: object) -> list[Any]:
        lives.number += 1
        return [row]

    stub: Any = SimpleNamespace(fetch=replaced, is_closed=lambda: False, terminate=lambda: None)
    store._lookup_conn = stub
    with pytest.raises(DatabaseUnavailable):
        await store.find(token)
    with pytest.raises(DatabaseUnavailable):
        await store._take_notice(stub, token.hex())
    assert store.known(token) is None
    plain = devices._piece
    for last in (False, True):

        async def piece(listener: Connection, cursor: Any, last: bool = last) -> list[Any]:
            found = await plain(listener, cursor)
            if last != bool(found):
                lives.number += 1
            return found

        monkeypatch.setattr(devices, "_piece", piece)
        async with database.connected(application="test") as reader:
            with pytest.raises(DatabaseUnavailable):
                await store._read_all(reader, "refresh")
        assert last or store.known(token) is None


async def test_a_token_that_was_unknown_to_the_database_before_is_asked_for_again(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MISS_HOLDS_S", 3600.0)
    store = devices.DeviceStore(database, refresh_s=3600)
    store._is_following = True
    token = devices.hash_token(devices.new_token())
    assert await store.find(token) is None
    await devices.add(conn, "kiosk-1", None)
    await conn.execute("UPDATE device_tokens SET token_sha256 = $1", token)
    assert await store.find(token) is None
    store._forget()
    store._is_following = True  # the listener's end is noticed a moment later
    assert await store.find(token)
    await store.close()
