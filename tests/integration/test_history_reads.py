"""Reads from the history return the same results in the same shape, and do not delay other requests."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from nexhb import config, partitions
from nexhb.config import ReadsSettings
from nexhb.devices import registry
from nexhb.postgres.connections import Connection, Database
from nexhb.reading import flags, rollout
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon
from tests.support.responses import either

LEGACY, FAST = ReadsSettings(from_last_status=False), ReadsSettings()
LISTS = ("/v1/devices/offline?minutes=10", "/v1/devices/unity-down")


async def fleet(nexhb: Nexhb, now: datetime) -> list[str]:
    """Create a fleet with every kind of device; return the device_ids."""
    names = [
        "on",
        "off",
        "down",
        "down-old",
        "bare",
        "late",
        "never",
        "rev",
        "back",
        "ahead",
        "slow",
        "set-back",
        *(f"s{n}" for n in range(5)),
    ]
    agents = {name: await nexhb.agent(name) for name in names}
    minute = timedelta(minutes=1)
    # How long ago each heartbeat was made, and how long ago it was received; None for the same time.
    sent: tuple[tuple[str, timedelta, timedelta | None, dict[str, Any]], ...] = (
        ("on", 0 * minute, None, {}), ("off", 11 * minute, None, {}),
        ("off", 90 * minute, 11 * minute, {"battery": {"pct": 3.0}}),
        ("down", minute, None, {"unity_process_running": False}), ("down", 3 * minute, minute, {}),
        ("down-old", 25 * 60 * minute, None, {"unity_process_running": False}), ("rev", 60 * minute, None, {}),
        ("back", 30 * minute, None, {}), ("ahead", -4 * minute, 0 * minute, {}), ("late", 5 * minute, None, {}),
        ("late", 3 * 1440 * minute, 5 * minute, {}), ("slow", 25 * minute, minute, {}),
        ("set-back", 3 * minute, None, {"system": {"uptime_seconds": 600.0}}),
        ("set-back", 42 * minute, 2 * minute, {"battery": {"pct": 4.0}, "system": {"uptime_seconds": 660.0}}),
        ("bare", 40 * minute, None, {"network": None, "app_versions": None, "app_version": None, "battery": None}),
        *((f"s{n}", (20 + n) * minute, None, {"unity_process_running": bool(n % 2)}) for n in range(5)),
    )  # fmt: skip
    for name, made, received, changes in sent:
        answer = await agents[name].live(now - made, None if received is None else now - received, **changes)
        assert answer.status == 200
    async with nexhb.database.connected(application="test") as conn:
        for name in ("rev", "back"):
            await registry.revoke(conn, name, now)
        await registry.rotate(conn, "back")
    return names


async def test_both_sources_give_the_same_results(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(now=now)
    names = await fleet(nexhb, now)
    paths = [
        *LISTS,
        *(f"{path}{'&' if '?' in path else '?'}limit=2" for path in LISTS),
        *(f"/v1/devices/{n}" for n in names),
    ]
    fast = [await nexhb.get(path) for path in paths]
    await nexhb.rows("UPDATE feature_flags SET value = 'false' WHERE flag = 'read_from_last_status'")
    async with asyncio.timeout(SOON_S):
        while (await nexhb.get(LISTS[0]))["source"] != "legacy":
            pass
    legacy = [await nexhb.get(path) for path in paths]
    assert [one.pop("source") for one in fast[:4]] == ["last_status"] * 4
    assert [one.pop("source") for one in legacy[:4]] == ["legacy"] * 4
    assert legacy == fast
    assert [list(one) for one in legacy] == [list(one) for one in fast]  # the order of the fields is the same too
    offline, down, few, _ = fast[:4]
    assert [row["device_id"] for row in offline["devices"]] == [
        "down-old",
        "bare",
        "back",
        "s4",
        "s3",
        "s2",
        "s1",
        "s0",
        "off",
    ]
    assert [row["device_id"] for row in down["devices"]] == ["down", "s0", "s2", "s4"]
    assert (few["count"], len(few["devices"])) == (9, 2)
    statuses = {one["device_id"]: one["status"] for one in legacy[4:]}
    assert (statuses["never"], statuses["rev"], statuses["back"]) == ("never_seen", "revoked", "ok")
    await nexhb.get("/v1/devices/nobody", 404)
    assert await nexhb.metric("nexhb_legacy_read_latency_seconds_count") >= len(paths)


async def test_a_device_silent_beyond_the_retention_is_inactive_in_both_sources(
    start_daemon: StartDaemon, now: datetime
) -> None:
    kept = config.PartitionsSettings(retention_days=7)
    nexhb = await start_daemon(now=now, partitions=kept, reads=LEGACY)
    agent = await nexhb.agent("gone")
    await agent.live(now - timedelta(days=7) + timedelta(minutes=1))
    await (await nexhb.agent("still")).live(now - timedelta(days=6))
    nexhb.clock.fixed = now + timedelta(hours=1)
    assert [row["device_id"] for row in (await nexhb.get(LISTS[0]))["devices"]] == ["still"]
    assert (await nexhb.get("/v1/devices/gone"))["status"] == "inactive"
    assert (await nexhb.get("/v1/devices/still"))["status"] == "ok"


async def test_a_row_far_in_the_future_is_ignored(start_daemon: StartDaemon, conn: Connection, now: datetime) -> None:
    nexhb = await start_daemon(reads=LEGACY)
    await (await nexhb.agent("kiosk")).live(now - timedelta(hours=1))
    ahead = now + timedelta(days=3)
    await partitions.ensure(conn, [ahead.date()])
    await conn.execute(
        """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong)
        SELECT $1, $1, device_no, 2000000000, label_no, false FROM device_heartbeats""",
        ahead,
    )
    assert [row["device_id"] for row in (await nexhb.get(LISTS[0]))["devices"]] == ["kiosk"]
    assert (await nexhb.get("/v1/devices/kiosk"))["last_ts"] < f"{now:%Y-%m-%dT%H:%M:%S}"


async def test_slow_reads_from_the_history_delay_nothing_else(
    start_daemon: StartDaemon, database: Database, conn: Connection, now: datetime
) -> None:
    url = SecretStr(database.dsn)
    reads = ReadsSettings(legacy_pool_size=1, from_last_status=False)
    nexhb = await start_daemon(database=config.DatabaseSettings(url=url, read_pool_size=1), reads=reads)
    agent = await nexhb.agent()
    await agent.live(now - timedelta(minutes=2))
    async with conn.transaction():
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")  # only reads of the history use it
        slow = [asyncio.create_task(either(nexhb, path)) for path in LISTS * 2]
        for minutes in range(2):
            assert (await agent.live(now - timedelta(minutes=minutes))).status == 200
        assert (await nexhb.get("/v1/fleet"))["online"] == 1
        assert not slow[0].done()
    assert 200 in [await read for read in slow]  # a read that gets no connection of the pool within 5 s receives 503


async def test_a_read_from_the_history_ends_at_its_timeout(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    nexhb = await start_daemon(reads=ReadsSettings(legacy_timeout_seconds=1, from_last_status=False))
    async with conn.transaction():
        await conn.execute("LOCK TABLE heartbeat_labels IN ACCESS EXCLUSIVE MODE")
        assert "statement timeout" in (await nexhb.get(LISTS[0], 503))["detail"]
    assert (await nexhb.get(LISTS[0]))["source"] == "legacy"


# ---- the rollout ----------------------------------------------------------------------------------------------------


async def source(nexhb: Nexhb, path: str, request_id: str | None = None) -> str:
    """Return the source of a list."""
    headers = {"x-admin": ADMIN_KEY} | ({"x-request-id": request_id} if request_id else {})
    async with nexhb.http.get(nexhb.url + path, headers=headers) as response:
        found: dict[str, Any] = await response.json()
        return str(found["source"])


async def test_a_request_id_always_gets_the_same_source_and_10_percent_is_about_a_tenth(
    start_daemon: StartDaemon,
) -> None:
    nexhb = await start_daemon(reads=ReadsSettings(rollout_percent=10))
    names = [f"request-{n}" for n in range(60)]
    inside = {name for name in names if rollout.is_included(name, 10)}
    assert 1 <= len(inside) <= 20
    for path in LISTS:
        found = {name for name in names if await source(nexhb, path, name) == "last_status"}
        assert found == inside
    by_chance = [await source(nexhb, LISTS[0]) for _ in range(100)]
    assert 1 <= by_chance.count("last_status") <= 40  # this assertion fails by chance once in 37,000 runs


async def test_a_device_always_has_the_same_source_and_stays_in_the_rollout(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(reads=ReadsSettings(rollout_percent=0))
    names = [f"kiosk-{n}" for n in range(20)]
    async with nexhb.database.connected(application="test") as conn:
        for name in names:
            await registry.add(conn, name, None)
    before: set[str] = set()
    for percent in (0, 10, 50, 100):
        async with nexhb.database.connected(application="test") as conn:
            await flags.change(conn, {"rollout_percent": percent}, "test", nexhb.clock(), flags.Flags())
        async with asyncio.timeout(SOON_S):
            while (await nexhb.get("/ops/flags"))["rollout_percent"] != percent:
                pass
        inside = {name for name in names for _ in range(2) if await is_fast(nexhb, name)}
        assert inside == {name for name in names if rollout.is_included(name, percent)}
        assert before <= inside
        before = inside
    assert before == set(names)


async def is_fast(nexhb: Nexhb, name: str) -> bool:
    """Return whether a read of this device reads device_last_status."""
    metric = 'last_status_read_latency_ms_count{query="device"}'
    before = await nexhb.metric(metric)
    await nexhb.get(f"/v1/devices/{name}")
    return await nexhb.metric(metric) > before


@pytest.mark.parametrize("reads", [LEGACY, FAST, ReadsSettings(rollout_percent=0)])
async def test_fleet_pages_and_history_do_not_depend_on_the_flags(
    start_daemon: StartDaemon, reads: ReadsSettings, now: datetime
) -> None:
    nexhb = await start_daemon(reads=reads)
    agent = await nexhb.agent()
    await agent.send(now)
    assert (await nexhb.get("/v1/fleet"))["online"] == 1
    assert (await nexhb.get("/v1/devices"))["devices"][0]["status"] == "ok"
    assert len((await nexhb.get(f"/v1/devices/{agent.device_id}/heartbeats"))["heartbeats"]) == 1
