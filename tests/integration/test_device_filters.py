"""Lists of devices can be limited by what is known of the devices, sorted, and read page by page."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from nexhb.devices import registry
from nexhb.reading import queries
from tests.conftest import Nexhb, StartDaemon
from tests.support.watching import MINUTE


@pytest.fixture
async def fleet(start_daemon: StartDaemon, now: datetime) -> Nexhb:
    """A fleet with a device in each state. A blackout from 29 to 12 minutes ago makes one of them unknown."""
    nexhb = await start_daemon(now=now)
    seen: dict[str, tuple[int, dict[str, Any]]] = {
        "here": (1, {"battery": {"pct": 80.0}, "app_version": "1.10.0"}),
        "down": (2, {"battery": {"pct": 12.0}, "unity_process_running": False}),
        "gone": (100, {"battery": {"pct": 3.0}, "unity_process_running": False}),
        "meanwhile": (31, {"battery": {"pct": 12.0}, "app_version": "v1.0"}),
        "revoked": (1, {"battery": {"pct": 1.0}}),
        "inactive": (3, {"battery": {"pct": 2.0}}),
    }
    for device_id, (minutes, changes) in seen.items():
        alias = f"Kiosk_{device_id.upper()} 100%"
        agent = await nexhb.agent(device_id)
        assert (await agent.live(now - minutes * MINUTE, alias=alias, **changes)).status == 200
    await nexhb.agent("never")
    await nexhb.rows("INSERT INTO taking_heartbeats (since, renewed_at) VALUES ($1, $2)", now - 12 * MINUTE, now)
    await nexhb.rows("INSERT INTO blackouts VALUES ($1, $2)", now - 29 * MINUTE, now - 12 * MINUTE)
    await nexhb.rows("UPDATE device_last_status SET status = 'inactive' WHERE device_id = 'inactive'")
    async with nexhb.database.connected(application="test") as conn:
        await registry.revoke(conn, "revoked", now)
    return nexhb


async def listed(nexhb: Nexhb, which: str = "", **parameters: object) -> list[str]:
    """Return the ids of the devices of a list, read in pages of one and at once."""
    path = f"/v1/devices{which}?{urlencode(parameters)}"
    whole = await nexhb.get(path)
    assert whole["next"] is None
    ids = [row["device_id"] for row in whole["devices"]]
    paged: list[str] = []
    following: str | None = ""
    while following is not None:
        page = await nexhb.get(f"{path}&limit=1&after={quote(following)}")
        paged += [row["device_id"] for row in page["devices"]]
        following = page["next"]
        if which and page["devices"]:
            assert page["count"] == whole["count"] == len(ids), "the count includes all pages"
    assert paged == ids
    return ids


async def test_devices_are_listed_by_state_and_the_fleet_counts_the_same(fleet: Nexhb) -> None:
    states = queries.STATES
    found = {state: await listed(fleet, state=state) for state in states}
    assert found == {
        "online": ["down", "here"], "offline": ["gone"], "unknown": ["meanwhile"],
        "unity_down": ["down", "gone"], "inactive": ["inactive"], "never_seen": ["never"], "revoked": ["revoked"],
    }  # fmt: skip
    counted = await fleet.get("/v1/fleet")
    assert {state: len(ids) for state, ids in found.items() if state != "revoked"} == {
        state: counted[state] for state in states if state != "revoked"
    }
    assert counted["unity_down_online"] == len(await listed(fleet, "/unity-down", state="online")) == 1
    shown = {row["device_id"]: (row["state"], row["online"]) for row in (await fleet.get("/v1/devices"))["devices"]}
    assert shown == {
        "here": ("online", True), "down": ("online", True), "gone": ("offline", False),
        "meanwhile": ("unknown", False), "never": ("never_seen", False), "inactive": ("inactive", True),
        "revoked": ("revoked", True),
    }  # fmt: skip
    device = await fleet.get("/v1/devices/meanwhile")
    assert (device["state"], device["online"]) == ("unknown", False)


async def test_silent_devices_and_those_whose_unity_is_down_are_listed_by_state(fleet: Nexhb) -> None:
    assert await listed(fleet, "/offline", state="unity_down") == ["gone"]
    assert await listed(fleet, "/offline", state="online") == []
    assert await listed(fleet, "/offline", minutes=1, sort="battery_pct") == ["gone", "down", "meanwhile"]
    assert await listed(fleet, "/offline", minutes=1, q="kiosk") == ["gone", "meanwhile", "down"]
    assert await listed(fleet, "/unity-down", state="offline") == ["gone"]
    assert await listed(fleet, "/unity-down", sort="heard_at") == ["gone", "down"]
    row = (await fleet.get("/v1/devices/unity-down?state=online"))["devices"][0]
    assert (row["device_id"], row["state"], row["site"], row["incident_id"]) == ("down", "online", None, None)


async def test_dying_batteries_old_versions_and_wrong_clocks_are_listed(fleet: Nexhb, now: datetime) -> None:
    assert await listed(fleet, battery_below=20, sort="battery_pct") == ["gone", "down", "meanwhile"]
    assert await listed(fleet, battery_below=12) == ["gone"]
    assert await listed(fleet, battery_below=50, state="inactive") == ["inactive"]
    assert await listed(fleet, agent_version_below="1.9") == ["down", "gone", "meanwhile"]
    assert await listed(fleet, agent_version_below="1.0.9") == ["meanwhile"]
    assert await listed(fleet, agent_version_below="1.0.0") == []
    assert await listed(fleet, agent_version="1.10.0") == ["here"]
    assert await listed(fleet, unity_pkg_version_below="2.1.1", state="online") == ["down", "here"]
    assert await listed(fleet, unity_pkg_version="2.1.0", state="unknown") == ["meanwhile"]
    await (await fleet.agent("late")).live(now + timedelta(days=300), now)
    assert await listed(fleet, clock_wrong="true") == ["late"]
    assert "late" not in await listed(fleet, clock_wrong="false")


async def test_a_part_of_the_id_the_name_or_the_alias_is_found_whatever_its_case(fleet: Nexhb) -> None:
    assert await listed(fleet, q="ONE") == ["gone"]
    assert await listed(fleet, q="kiosk_m") == ["meanwhile"]
    assert await listed(fleet, q="ok_m", sort="heard_at") == await listed(fleet, q="0%_") == []
    assert len(await listed(fleet, q="100%")) == 6
    async with fleet.database.connected(application="test") as conn:
        await registry.change(conn, "never", {"name": "Der Große"})
    assert await listed(fleet, q="GROSSE") == []
    assert await listed(fleet, q="der gro") == await listed(fleet, q="der", state="never_seen") == ["never"]


async def test_devices_are_sorted_and_limited_together(fleet: Nexhb, now: datetime) -> None:
    assert await listed(fleet, sort="heard_at") == ["gone", "meanwhile", "down", "here"]
    assert await listed(fleet, sort="-heard_at") == ["here", "down", "meanwhile", "gone"]
    await fleet.rows("INSERT INTO sites (site) VALUES ('s')")
    await fleet.rows("UPDATE devices SET site = 's', tags = '{t}' WHERE device_id IN ('here', 'gone', 'never')")
    assert await listed(fleet, site="s", sort="heard_at") == ["gone", "here"]
    assert await listed(fleet, tag="t", battery_below=50) == ["gone"]
    assert await listed(fleet, tag="t", state="never_seen") == ["never"]
    row = (await fleet.get("/v1/devices?tag=t&battery_below=50"))["devices"][0]
    assert (row["site"], row["tags"]) == ("s", ["t"])


async def test_devices_that_the_rate_limit_slows_are_listed(fleet: Nexhb, now: datetime) -> None:
    statement = """INSERT INTO device_refusals (device_no, refused_at, status, reason)
        SELECT device_no, $2, $3, 'x' FROM devices WHERE device_id = $1"""
    await fleet.rows(statement, "here", now - MINUTE, 429)
    await fleet.rows(statement, "down", now - MINUTE, 422)
    await fleet.rows(statement, "gone", now - 11 * MINUTE, 429)
    assert await listed(fleet, limited="true") == await listed(fleet, limited="true", sort="heard_at") == ["here"]
    assert await listed(fleet, "/unity-down", limited="true") == []
    assert len(await listed(fleet, limited="false")) == 7


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ("state=asleep", "state"), ("battery_below=0", "battery_below"), ("battery_below=x", "battery_below"),
        ("clock_wrong=perhaps", "clock_wrong"), ("limited=2", "limited"), ("sort=alias", "sort"),
        ("agent_version_below=new", "agent_version_below"), ("unity_pkg_version_below=1.", "unity_pkg_version_below"),
        (f"q={'x' * 101}", "q"), ("agent_version=%00", "agent_version"), ("sort=battery_pct&after=x", "after"),
        ("sort=heard_at&after=5/x", "after"), ("batery_below=5", "batery_below"),
    ],
)  # fmt: skip
async def test_a_parameter_that_is_not_valid_is_named(nexhb: Nexhb, parameters: str, name: str) -> None:
    for which in ("", "/offline", "/unity-down"):
        assert (await nexhb.get(f"/v1/devices{which}?{parameters}", 400))["errors"][0]["path"] == name


async def test_a_filtered_list_is_read_from_the_last_status_whatever_the_flags_are(fleet: Nexhb) -> None:
    await fleet.rows("UPDATE feature_flags SET value = 'false' WHERE flag = 'read_from_last_status'")
    assert (await fleet.get("/v1/devices/offline?battery_below=50"))["source"] == "last_status"
