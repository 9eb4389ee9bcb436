"""Refused devices and shared tokens are logged once, and reported by every daemon."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import orjson
import pytest

from nexhb import daemon
from nexhb.config import IngestSettings
from nexhb.devices import registry, troubles
from nexhb.devices.shared_tokens import Kiosk
from nexhb.devices.store import Device
from nexhb.devices.troubles import Troubles
from nexhb.heartbeat import Heartbeat
from nexhb.ingest import parser
from nexhb.postgres import identity
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.identity import CheckedDatabase
from tests.conftest import SOON_S, Nexhb, StartDaemon, example

MADE = datetime(2026, 11, 24, 2, tzinfo=UTC)

FIVE_HUNDRED = IngestSettings(device_burst=500, device_per_minute=1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, object]]:
    """Record event, device and status of each log line."""
    lines: list[tuple[str, str, object]] = []

    class Log:
        def warning(self, event: str, **fields: object) -> None:
            lines.append((event, str(fields.get("device_id")), fields.get("status", fields.get("count"))))

    monkeypatch.setattr(troubles, "_log", Log())
    return lines


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Troubles]:
    """Record the troubles of each daemon, in the order of their starts."""
    made: list[Troubles] = []

    class Kept(Troubles):
        def __init__(self, database: Database, now: object, bucket_seconds: int) -> None:
            super().__init__(database, now, bucket_seconds)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(daemon, "Troubles", Kept)
    return made


async def refusal(nexhb: Nexhb, device_id: str) -> dict[str, object] | None:
    """Return the device's last refusal as an operator sees it."""
    found: dict[str, object] | None = (await nexhb.get(f"/v1/devices/{device_id}"))["last_refusal"]
    return found


async def test_a_refused_or_limited_device_is_logged_once_and_every_daemon_reports_the_reason(
    start_daemon: StartDaemon,
    now: datetime,
    conn: Connection,
    told: list[tuple[str, str, object]],
    kept: list[Troubles],
) -> None:
    """Formerly, refusals were only counted, and the counter named no device."""
    nexhb, second = await start_daemon(ingest=FIVE_HUNDRED), await start_daemon()
    agent = await nexhb.agent("kiosk-1")
    assert await refusal(nexhb, "kiosk-1") is None
    asked = [
        (agent.send(now, battery={"pct": 200}), 422, "battery.pct"),
        (agent.send(now, battery={"pct": 300}), 422, "battery.pct"),
        (agent.post(b"{"), 400, None),
        (agent.post(b"{}", **{"Content-Type": "text/plain"}), 415, None),
        (agent.post(b"x" * 70_000), 413, None),
        (agent.post(orjson.dumps([example(now), {"battery": 5}]), "/v1/heartbeats"), 422, "battery"),
        (agent.post(b'{"a":1}', "/v1/heartbeats"), 400, None),
        (agent.post(orjson.dumps([{}] * 499), "/v1/heartbeats"), 429, None),
    ]
    for answer, status, field in asked:
        heard = await answer
        assert heard.status == (200 if field == "battery" else status)
        found = await refusal(nexhb, "kiosk-1")
        assert found is not None
        assert (found["status"], found["field"] if field else None) == (status, field), heard.body
        assert found["reason"]
    lines = [line for line in told if line[0] == "device.refused"]
    assert [status for _, _, status in lines] == [422, 400, 415, 413, 422, 400, 429]
    assert await refusal(second, "kiosk-1") is None
    await kept[0].flush()
    assert await refusal(second, "kiosk-1") == await refusal(nexhb, "kiosk-1")
    await registry.revoke(conn, "kiosk-1", now)
    while (await agent.send(now)).status != 410:
        pass
    found = await refusal(nexhb, "kiosk-1")
    assert (found or {})["status"] == 410
    await kept[0].flush()
    await kept[0].flush()  # there is nothing new to write
    assert await refusal(second, "kiosk-1") == found


async def test_a_shared_token_is_logged_once_and_reported_until_it_is_rotated(
    start_daemon: StartDaemon,
    now: datetime,
    conn: Connection,
    told: list[tuple[str, str, object]],
    kept: list[Troubles],
) -> None:
    nexhb, second = await start_daemon(), await start_daemon()
    agent = await nexhb.agent("kiosk-1")
    start = now - timedelta(hours=1)
    for minute in range(6):
        made = start + timedelta(minutes=minute)
        system = {"uptime_seconds": float(minute * 60 + 90_000 * (minute % 2)), "model": "SM-T500"}
        assert (await agent.send(made, system=system)).status == 200
    assert [line for line in told if line[0] == "device.token_shared"] == [("device.token_shared", "kiosk-1", None)]
    await kept[0].flush()
    for daemons in (nexhb, second):
        found = (await daemons.get("/v1/devices/kiosk-1"))["token_shared"]
        assert {kiosk["ip"] for kiosk in found["kiosks"]} == {"192.168.1.50"}
        assert found["kiosks"][0]["booted_at"] != found["kiosks"][1]["booted_at"]
    await registry.rotate(conn, "kiosk-1")
    assert (await second.get("/v1/devices/kiosk-1"))["token_shared"] is None


def test_entries_and_log_lines_are_limited(
    told: list[tuple[str, str, object]], monkeypatch: pytest.MonkeyPatch, database: Database, now: datetime
) -> None:
    monkeypatch.setattr(troubles, "MAX_ENTRIES", 5)
    kept = Troubles(database, lambda: now, 10)
    for number in range(300):
        kept.refused(Device(number, f"kiosk-{number}", revoked=False), 422, "x" * 1_000)
    assert len(kept._refusals) == 5
    assert 100 <= len(told) < 150
    assert len((kept.last_refusal("kiosk-299") or {})["reason"]) == troubles.MAX_REASON
    pair = (Kiosk("A", None, None, None), Kiosk("B", None, None, None))
    for number in range(20):
        kept._note(heartbeat(number), pair)
    assert list(kept._shared) == [f"kiosk-{number}" for number in range(15, 20)]


def heartbeat(device_no: int) -> Heartbeat:
    """Return a heartbeat of the device with this number."""
    rules = parser.HeartbeatRules("io.unitynodes.unityapp", 10, timedelta(days=7), timedelta(minutes=5))
    body = orjson.dumps(example(MADE))
    return parser.parse(body, device_no=device_no, device_id=f"kiosk-{device_no}", received_at=MADE, rules=rules)


async def test_repeated_refusals_are_logged_again_after_an_hour_and_suppressed_lines_are_counted(
    told: list[tuple[str, str, object]], monkeypatch: pytest.MonkeyPatch, database: Database, now: datetime
) -> None:
    passed_s = 1e6
    monkeypatch.setattr(troubles, "time", SimpleNamespace(monotonic=lambda: passed_s))
    monkeypatch.setattr(troubles, "FLUSH_S", 0.0)
    kept, device = Troubles(database, lambda: now, 10), Device(1, "kiosk-1", revoked=False)
    lines = []
    for passed_s in (1e6, 1e6 + 3_599, 1e6 + 3_601, 1e6 + 3_602):  # noqa: B007 - the clock reads it
        kept.refused(device, 422, "no", "battery")
        lines.append(len(told))
    assert lines == [1, 1, 2, 2]
    for number in range(2, 204):
        kept.refused(Device(number, f"kiosk-{number}", revoked=False), 422, "no")
    monkeypatch.setattr(kept, "flush", asyncio.Event().wait)
    running = asyncio.create_task(kept.run())
    async with asyncio.timeout(SOON_S):
        while told[-1][0] != "device.refusals_not_logged":
            await asyncio.sleep(0)
    running.cancel()
    assert told[-1] == ("device.refusals_not_logged", "None", 204 - (len(told) - 1))


async def test_of_two_daemons_the_newer_entry_and_the_earlier_start_are_kept(
    database: Database, conn: Connection, now: datetime
) -> None:
    """Each daemon writes once per minute, in any order."""
    await registry.add(conn, "kiosk-1", None)
    device, pair = Device(1, "kiosk-1", revoked=False), (Kiosk("A", None, None, None), Kiosk("B", None, None, None))
    seen = {}
    for minutes in (0, 2, 1):
        seen[minutes] = Troubles(database, lambda minutes=minutes: now + timedelta(minutes=minutes), 10)  # type: ignore[misc]
        seen[minutes].refused(device, 422, f"reason {minutes}")
        seen[minutes]._note(heartbeat(1), pair)
        await seen[minutes].flush()
    last = now + timedelta(minutes=2)
    [refusal] = await conn.fetch("SELECT refused_at, reason FROM device_refusals")
    [shared] = await conn.fetch("SELECT since, last_at FROM shared_tokens")
    assert (tuple(refusal), tuple(shared)) == ((last, "reason 2"), (now, last))
    seen[0]._now = lambda: now + timedelta(minutes=3)
    seen[0]._note(heartbeat(1), pair)
    assert (seen[0].token_shared("kiosk-1") or {})["since"] == now


async def test_an_entry_is_written_once(database: Database, conn: Connection, now: datetime) -> None:
    """Formerly, ten thousand unchanged rows were locked and written every minute."""
    await registry.add(conn, "kiosk-1", None)
    await registry.add(conn, "kiosk-2", None)
    kept, locked = Troubles(database, lambda: now, 10), []
    for number in (1, 2):
        kept.refused(Device(number, f"kiosk-{number}", revoked=False), 422, "no")
        await kept.flush()
        locked.append(await conn.fetchval("SELECT xmax::text FROM device_refusals WHERE device_no = 1"))
    assert locked[0] == locked[1]


async def test_entries_of_the_previous_database_are_not_written_to_another_one(
    database: Database, conn: Connection, now: datetime
) -> None:
    """The connection for the write detects the other database, which clears all entries."""
    await registry.add(conn, "another", None)
    tracker = identity.DatabaseTracker()
    kept = Troubles(CheckedDatabase.wrap(database, tracker), lambda: now, 10)
    tracker.on_change(kept.forget)
    tracker._oid = 1
    kept.look(heartbeat(1))
    kept.refused(Device(1, "kiosk-1", revoked=False), 422, "no")
    kept._note(heartbeat(1), (Kiosk("A", None, None, None), Kiosk("B", None, None, None)))
    await kept.flush()
    assert (tracker.epoch, kept.last_refusal("kiosk-1"), kept.token_shared("kiosk-1")) == (1, None, None)
    assert kept._shared_tokens._seen == {}
    assert (
        await conn.fetchval("SELECT (SELECT count(*) FROM device_refusals) + (SELECT count(*) FROM shared_tokens)") == 0
    )
