"""The lists of devices, the sites and the fleet's counts show what the watcher has recorded."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from nexhb.devices import registry
from nexhb.postgres.connections import Connection
from nexhb.reading import comparison
from nexhb.reading.queries import OfflineQuery
from tests.conftest import ADMIN_KEY, StartDaemon, shown
from tests.support.watching import MINUTE, Watched


@pytest.fixture
async def watched(start_daemon: StartDaemon, conn: Connection, now: datetime) -> Watched:
    """A daemon whose rounds the test runs, and a fleet without kiosks."""
    return await Watched.start(start_daemon, conn, now)


async def listed(watched: Watched, which: str, *fields: str) -> list[tuple[Any, ...]]:
    """Return these fields of the devices in a list."""
    rows = (await watched.nexhb.get(f"/v1/devices/{which}"))["devices"]
    return [tuple(row[field] for field in fields) for row in rows]


async def test_silent_devices_are_listed_and_counted_with_their_causes(watched: Watched) -> None:
    await watched.add("s1", "s2", "s3", site="store-42")
    await watched.add("a", "b", "c", "d")
    watched.kiosks["a"].changes = {"battery": {"pct": 3.0, "charging": False}}
    await watched.minutes(2)
    began = watched.now
    await watched.minutes(11, silent=["s1", "s2", "a"])
    watched.kiosks["b"].changes = {"unity_process_running": False}
    await watched.minutes(1, silent=["s1", "s2", "a"])
    fields = ("device_id", "site", "since", "cause", "incident_id")
    of_site = await watched.conn.fetchval("SELECT incident_id FROM incidents WHERE scope = 'site'")
    of_device = await watched.conn.fetchval(
        "SELECT incident_id FROM incidents WHERE scope = 'device' AND kind = 'offline'"
    )
    assert sorted(await listed(watched, "offline", *fields)) == [
        ("a", None, shown(began), "battery", of_device), ("s1", "store-42", shown(began), "site", of_site),
        ("s2", "store-42", shown(began), "site", of_site),
    ]  # fmt: skip
    [(device, since, incident)] = await listed(watched, "unity-down", "device_id", "since", "incident_id")
    expected = await watched.conn.fetchval("SELECT incident_id FROM incidents WHERE kind = 'unity_down'")
    assert (device, since, incident) == ("b", shown(watched.now), expected)
    fleet = await watched.nexhb.get("/v1/fleet")
    assert (fleet["offline"], fleet["online"], fleet["unknown"]) == (3, 4, 0)
    assert {cause: count for cause, count in fleet["offline_by_cause"].items() if count} == {"site": 2, "battery": 1}
    assert sum(fleet["offline_by_cause"].values()) == 3
    site = await watched.nexhb.get("/v1/sites/store-42")
    counted = {name: site[name] for name in ("devices", "online", "offline", "unity_down")}
    assert counted == {"devices": 3, "online": 1, "offline": 2, "unity_down": 0}
    assert (await watched.nexhb.get("/v1/sites"))["sites"] == [site]
    await registry.revoke(watched.conn, "a", watched.now)
    assert (await watched.nexhb.get("/v1/fleet"))["offline_by_cause"]["battery"] == 0


async def test_the_history_knows_no_causes_and_perf_diff_finds_no_difference(watched: Watched) -> None:
    """A cause in the rows that perf_diff compares would count as a difference in every list."""
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(11, silent=["a"])
    assert await listed(watched, "offline", "device_id", "cause") == [("a", "unknown")]
    query = OfflineQuery(10 * MINUTE, 10)
    compared = await comparison.compare(watched.conn, query, watched.now, watched.nexhb.settings)
    assert (compared.fast_rows, compared.history_rows, compared.mismatches) == (1, 1, [])
    flags = {"read_from_last_status": False}
    url, headers = f"{watched.nexhb.url}/ops/flags", {"x-admin": ADMIN_KEY}
    async with watched.nexhb.http.put(url, json=flags, headers=headers) as response:
        assert response.status == 200
    assert await listed(watched, "offline", "device_id", "cause", "since") == [("a", None, None)]


async def test_a_device_that_is_silent_only_because_of_our_blackout_is_unknown(watched: Watched) -> None:
    """Such a device may not have had its chance to send. Formerly, it was counted as online."""
    await watched.add("before", "after", "long")
    await watched.minutes(1)
    start = watched.now
    await watched.minutes(20, silent=["before", "long"])  # nobody was heard for ten of these minutes
    end = watched.now
    await watched.conn.execute("DELETE FROM blackouts")
    blackout = "INSERT INTO blackouts (began_at, ended_at) VALUES ($1, $2)"
    await watched.conn.execute(blackout, start + 5 * MINUTE, end - MINUTE)
    fleet = await watched.nexhb.get("/v1/fleet")
    assert [fleet[name] for name in ("devices", "online", "offline", "unknown")] == [3, 1, 0, 2]
    watched.nexhb.clock.fixed = end + timedelta(minutes=20)
    fleet = await watched.nexhb.get("/v1/fleet")
    assert [fleet[name] for name in ("devices", "online", "offline", "unknown")] == [3, 0, 3, 0]
