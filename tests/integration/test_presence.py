"""Presence depends on the time of arrival, content on the time of making; an outage of nexhb is not counted as silence
of the devices."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from nexhb import availability, clock
from nexhb import daemon as daemon_module
from nexhb.clock import DatabaseClock
from nexhb.config import HeartbeatSettings
from nexhb.devices.presence import AGENT_WAIT
from nexhb.ingest import batch
from nexhb.jobs.reconcile import reconcile
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.reading import rows
from tests.conftest import Agent, Nexhb, StartDaemon, example, shown
from tests.support.heartbeats import NOON, beat

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
UPTIME = 100_000.0


def system(uptime_s: float) -> dict[str, Any]:
    """Return the device section of a heartbeat with this uptime."""
    return {"system": {"uptime_seconds": uptime_s, "model": "SM-T500"}}


async def device(nexhb: Nexhb, device_id: str) -> dict[str, Any]:
    """Return one device as the API shows it."""
    found: dict[str, Any] = await nexhb.get(f"/v1/devices/{device_id}")
    return found


async def offline(nexhb: Nexhb) -> list[str]:
    """Return the ids of the devices listed as offline."""
    return [row["device_id"] for row in (await nexhb.get("/v1/devices/offline"))["devices"]]


# ---- presence -------------------------------------------------------------------------------------------------------


async def test_a_live_kiosk_whose_clock_is_slow_is_online_and_its_skew_is_shown(nexhb: Nexhb, now: datetime) -> None:
    """Formerly, a device whose clock was 25 minutes slow was "offline" for ever, without any visible reason."""
    agent = await nexhb.agent("slow")
    await agent.live(now - 25 * MINUTE, received_at=now)
    nexhb.clock.fixed = now + MINUTE
    assert await offline(nexhb) == []
    found = await device(nexhb, "slow")
    assert (found["last_ts"], found["heard_at"]) == (shown(now - 25 * MINUTE), shown(now))
    assert (found["online"], found["clock_skew_seconds"]) == (True, -1500)
    assert [row["clock_skew_seconds"] for row in (await nexhb.get("/v1/devices"))["devices"]] == [-1500]
    nexhb.clock.fixed = now + 11 * MINUTE
    [row] = (await nexhb.get("/v1/devices/offline"))["devices"]
    assert (row["offline_seconds"], row["clock_skew_seconds"], row["heard_at"]) == (660, -1500, shown(now))


def test_the_skew_of_a_clock_outside_the_accept_window_is_unknown(now: datetime) -> None:
    """The time of arrival replaces the ts of a heartbeat outside the accept window, so that the skew would be shown as
    0."""
    assert rows.clock_skew_s(now - MINUTE, now, clock_wrong=False) == -60
    assert rows.clock_skew_s(now, now, clock_wrong=True) is None
    assert rows.clock_skew_s(None, now, clock_wrong=False) is None


async def test_a_replayed_heartbeat_and_a_duplicate_count_as_presence_but_a_refused_one_does_not(
    nexhb: Nexhb, now: datetime
) -> None:
    agents = {name: await nexhb.agent(name) for name in ("queue", "again", "refused")}
    for agent in agents.values():
        await agent.live(now - 60 * MINUTE)
    nexhb.clock.fixed = now
    queue = [example(now - minutes * MINUTE) for minutes in (50, 40)]
    assert (await agents["queue"].post(orjson.dumps(queue), "/v1/heartbeats")).body["written"] == 2
    assert (await agents["again"].send(now - 60 * MINUTE)).body["deduplicated"] is True
    assert (await agents["refused"].send(now, battery={"pct": 200})).status == 422
    assert await offline(nexhb) == ["refused"]
    assert (await device(nexhb, "queue"))["last_ts"] == shown(now - 40 * MINUTE)
    assert (await device(nexhb, "again"))["heard_at"] == shown(now)


async def test_unity_down_shows_whether_each_device_is_online(nexhb: Nexhb, now: datetime) -> None:
    await (await nexhb.agent("off")).live(now - 60 * MINUTE, unity_process_running=False)
    await (await nexhb.agent("on")).live(now, unity_process_running=False)
    nexhb.clock.fixed = now
    rows = (await nexhb.get("/v1/devices/unity-down"))["devices"]
    assert [(row["device_id"], row["online"]) for row in rows] == [("on", True), ("off", False)]
    fleet = await nexhb.get("/v1/fleet")
    assert (fleet["unity_down"], fleet["unity_down_online"], fleet["offline"]) == (2, 1, 1)


# ---- content --------------------------------------------------------------------------------------------------------


async def test_a_clock_that_was_set_back_is_recognised_by_the_uptime(nexhb: Nexhb, now: datetime) -> None:
    """Formerly, the status of such a device did not change until its clock had caught up."""
    agent = await nexhb.agent("kiosk")
    await agent.live(now - 2 * MINUTE, battery={"pct": 50.0}, **system(UPTIME))
    await agent.live(now - 40 * MINUTE, received_at=now - MINUTE, battery={"pct": 60.0}, **system(UPTIME + 60))
    found = await device(nexhb, "kiosk")
    assert (found["battery_pct"], found["last_ts"]) == (60, shown(now - 40 * MINUTE))
    # A queue from this boot or the previous one changes nothing; heartbeats with the new clock do.
    await agent.live(now - 45 * MINUTE, received_at=now, battery={"pct": 1.0}, **system(UPTIME - 300))
    await agent.live(now - 50 * MINUTE, received_at=now, battery={"pct": 2.0}, **system(9 * UPTIME))
    assert (await device(nexhb, "kiosk"))["battery_pct"] == 60
    await agent.live(now - 39 * MINUTE, received_at=now, battery={"pct": 70.0}, **system(UPTIME + 120))
    assert (await device(nexhb, "kiosk"))["battery_pct"] == 70


HOURS_40 = timedelta(hours=40)


async def test_a_heartbeat_received_by_a_daemon_whose_clock_was_ahead_does_not_freeze_the_status(
    start_daemon: StartDaemon, now: datetime
) -> None:
    """Formerly, one heartbeat from 40 days in the future froze a device's content for 40 days, through every
    restart."""
    nexhb = await start_daemon(now=now)
    for device_id, clock_ahead in (("right", timedelta(0)), ("ahead too", timedelta(days=40))):
        agent = await nexhb.agent(device_id)
        await agent.live(now + clock_ahead, received_at=now + timedelta(days=40), alias="Old name")
        assert (await device(nexhb, device_id))["alias"] == "Old name"
        await agent.live(now, alias="New name", battery={"pct": 12.0})
        found = await device(nexhb, device_id)
        assert (found["alias"], found["battery_pct"]) == ("New name", 12)
        assert (found["last_ts"], found["heard_at"]) == (shown(now), shown(now))


async def test_an_arrival_time_three_days_in_the_past_does_not_restore_an_older_status(
    nexhb: Nexhb, now: datetime
) -> None:
    agent = await nexhb.agent("kiosk")
    await agent.live(now, battery={"pct": 50.0}, **system(UPTIME))
    behind = now - timedelta(days=3)
    await agent.live(now - 60 * MINUTE, received_at=behind, battery={"pct": 1.0}, **system(UPTIME - 3600))
    await agent.live(now - timedelta(days=4), received_at=behind, battery={"pct": 2.0}, **system(UPTIME - 9999))
    found = await device(nexhb, "kiosk")
    assert found["battery_pct"] == 50


async def facts(conn: Connection) -> tuple[str, str]:
    """Return the alias and model of the only device."""
    row = await conn.fetchrow("SELECT alias, model FROM devices")
    assert row is not None
    return row["alias"], row["model"]


async def test_a_name_that_was_ignored_once_is_stored_as_soon_as_it_is_newer(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Formerly, after "Old name" with a fast clock, "New name" with a right clock was ignored six times, until a
    restart."""
    agent = await nexhb.agent()
    await agent.live(now + 4 * MINUTE, received_at=now, alias="Old name")
    for minutes in range(1, 7):
        await agent.live(now + minutes * MINUTE, alias="New name")
    assert (await facts(conn))[0] == "New name"


async def test_a_heartbeat_without_facts_about_the_device_leaves_nothing_to_update(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Otherwise each heartbeat without facts would update `devices`, and so would the next heartbeat with facts."""
    agent = await nexhb.agent("kiosk")
    assert (await agent.send(now - 2 * MINUTE)).status == 200
    facts = "SELECT said_facts, kept_facts FROM device_last_status"
    [before] = await conn.fetch(facts)
    assert before["said_facts"] == before["kept_facts"] is not None
    assert (await agent.post(orjson.dumps({"timestamp_utc": shown(now - MINUTE)}))).status == 200
    assert await conn.fetch(facts) == [before]
    assert (await device(nexhb, "kiosk"))["last_ts"] == shown(now - MINUTE)


async def test_two_daemons_agree_on_a_name_that_changes_there_and_back(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    """Formerly, after X was sent to one daemon, Y to the other and X to the first again, the name stayed Y: the first
    daemon assumed that X was still stored."""
    one, other = await start_daemon(), await start_daemon()
    agent = await one.agent()
    elsewhere = Agent(other, agent.device_id, agent.token)
    for minutes, (sender, alias) in enumerate([(agent, "X"), (elsewhere, "Y"), (agent, "X"), (elsewhere, "X")]):
        await sender.send(now - (10 - minutes) * MINUTE, alias=alias)
        assert (await facts(conn))[0] == alias
    await agent.send(now - 30 * MINUTE, alias="from a queue")
    assert (await facts(conn))[0] == "X"


async def test_a_queue_whose_newest_heartbeat_lacks_the_name_keeps_the_one_before(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    beats = [
        example(now - 3 * MINUTE, alias="first", system={"model": "A"}),
        example(now - 2 * MINUTE, alias="second", system={"model": "B"}),
        example(now - MINUTE, alias=None, system=None),
    ]
    await (await nexhb.agent()).post(orjson.dumps(beats), "/v1/heartbeats")
    assert await facts(conn) == ("second", "B")


async def test_an_operators_name_stays_until_the_device_sends_another_one(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    await agent.send(now - 5 * MINUTE, alias="device's")
    await conn.execute("UPDATE devices SET alias = 'operator''s'")
    await agent.send(now - 4 * MINUTE, alias="device's")
    assert (await facts(conn))[0] == "operator's"
    await agent.send(now - 3 * MINUTE, alias="device's other")
    assert (await facts(conn))[0] == "device's other"


CONTENT = ("battery_pct", "plugged", "temp_c", "network_type", "ssid", "ip", "signal_dbm", "ram_used_mb", "uptime_s",
           "unity_pkg_version", "unity_running", "agent_version")  # fmt: skip
SAYS_NOTHING = {
    "battery": ("battery_pct", "plugged", "temp_c"), "network": ("network_type", "ssid", "ip", "signal_dbm"),
    "memory": ("ram_used_mb",), "system": ("uptime_s",), "app_versions": ("unity_pkg_version", "unity_running"),
}  # fmt: skip


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "as a queue"])
async def test_an_absent_section_keeps_its_values_and_a_present_one_replaces_all_of_them(
    nexhb: Nexhb, now: datetime, together: bool
) -> None:
    """Formerly, a heartbeat with only a timestamp wiped battery, ssid and version from the last status."""
    absent: dict[str, Any] = dict.fromkeys(
        [*SAYS_NOTHING, "app_version", "unity_process_running", "monitored_foreground_recent_s"]
    )
    for section, wiped in SAYS_NOTHING.items():
        agent = await nexhb.agent(section)
        beats = [example(now - 3 * MINUTE, signal_dbm=-60), example(now - 2 * MINUTE, **absent)]
        beats.append(example(now - MINUTE, **absent | {section: {}}))
        if together:
            await agent.post(orjson.dumps(beats), "/v1/heartbeats")
        else:
            for one in beats:
                await agent.post(orjson.dumps(one))
        found = await device(nexhb, section)
        assert found["last_ts"] == shown(now - MINUTE)
        assert [name for name in CONTENT if found[name] is None] == [name for name in CONTENT if name in wiped]


async def test_unity_not_being_installed_replaces_the_previous_state(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent("kiosk")
    await agent.send(now - 3 * MINUTE)
    await agent.send(now - 2 * MINUTE, app_versions={"io.unitynodes.unityapp": {"installed": False}})
    found = await device(nexhb, "kiosk")
    assert (found["unity_running"], found["unity_pkg_version"]) == (None, None)
    await agent.send(now - MINUTE, app_versions=None, unity_process_running=False)
    assert (await device(nexhb, "kiosk"))["unity_running"] is False


# ---- one rule, in Python and in SQL, in the writer and in the reconciliation -----------------------------------------

moments = st.integers(-2, 2).flatmap(lambda days: st.integers(-200, 200).map(lambda s: days * 86_400 + s))
statuses = st.tuples(moments, moments, st.none() | st.integers(0, 400), st.booleans())


@given(st.lists(st.tuples(statuses, statuses), min_size=20, max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_python_and_sql_agree_which_content_is_newer(conn: Connection, pairs: list[Any]) -> None:
    for pair in pairs:
        known, new = [
            structs.replace(
                beat(ts=NOON + timedelta(seconds=ts)), received_at=NOON + timedelta(seconds=received),
                uptime_s=uptime, clock_wrong=wrong,
            )
            for ts, received, uptime, wrong in pair
        ]  # fmt: skip
        arguments = [value for h in (known, new) for value in (h.ts, h.received_at, h.uptime_s, h.clock_wrong)]
        found = await conn.fetchval("SELECT newer_content($1, $2, $3, $4, $5, $6, $7, $8) IS TRUE", *arguments)
        assert found is batch.is_newer(known, new)


async def test_a_lost_status_is_repaired_to_what_the_writer_had_written(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent("set back")
    await agent.live(now - 3 * MINUTE, **system(UPTIME))
    await agent.live(now - 40 * MINUTE, received_at=now - 2 * MINUTE, battery={"pct": 60.0}, **system(UPTIME + 60))
    agent = await nexhb.agent("replays")
    await agent.live(now - 30 * MINUTE, **system(UPTIME))
    await agent.live(now - 50 * MINUTE, received_at=now - MINUTE, **system(UPTIME - 1200))
    agent = await nexhb.agent("behind")
    await agent.live(now - 30 * MINUTE, **system(UPTIME))
    before = "SELECT * FROM device_last_status ORDER BY device_no"
    right = [dict(row) for row in await conn.fetch(before)]
    assert (await reconcile(conn, now, max_rows=10)).wrong == 0
    await conn.execute("DELETE FROM device_last_status WHERE device_no < 3")
    await conn.execute("UPDATE device_last_status SET heard_at = heard_at - interval '1 day'")
    assert (await reconcile(conn, now, max_rows=10)).updated == 3
    healed = [dict(row) | {"said_facts": row["kept_facts"]} for row in await conn.fetch(before)]
    digests = {"said_facts": None, "kept_facts": None, "changes": None}
    assert [one | digests for one in healed] == [one | digests for one in right]


PARTIAL: dict[str, dict[str, Any]] = {
    "nothing": {}, "signal": {"signal_dbm": -50}, "unity": {"unity_process_running": False},
    "agent": {"app_version": "2.0.0"}, **{section: {section: {}} for section in SAYS_NOTHING},
}  # fmt: skip


async def test_a_partial_heartbeat_is_repaired_to_what_the_writer_had_written(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The writer's and the reconciliation's statements have the same list of sections. The signal, Unity's state and
    the agent's version may come without the other fields of their sections."""
    absent: dict[str, Any] = dict.fromkeys(
        [*SAYS_NOTHING, "app_version", "unity_process_running", "monitored_foreground_recent_s"]
    )
    agents = {name: await nexhb.agent(name) for name in PARTIAL}
    for agent in agents.values():
        await agent.live(now - 3 * MINUTE, signal_dbm=-60)
    columns = await conn.fetchval(
        """SELECT string_agg(column_name, ', ') FROM information_schema.columns
           WHERE table_name = 'device_last_status' AND is_generated = 'NEVER'"""
    )
    await conn.execute(f"CREATE TABLE before AS SELECT {columns} FROM device_last_status")
    for name, agent in agents.items():
        await agent.live(now - MINUTE, **absent | PARTIAL[name])
    statuses = f"SELECT {columns} FROM device_last_status ORDER BY device_no"
    right = [dict(row) for row in await conn.fetch(statuses)]
    by_name = {one["device_id"]: one for one in right}
    assert (by_name["signal"]["signal_dbm"], by_name["signal"]["ssid"]) == (-50, "Store-42")
    assert (by_name["unity"]["unity_running"], by_name["unity"]["unity_pkg_version"]) == (False, "2.1.0")
    assert (by_name["agent"]["agent_version"], by_name["nothing"]["agent_version"]) == ("2.0.0", "1.0.9")
    await conn.execute("DELETE FROM device_last_status")
    await conn.execute(f"INSERT INTO device_last_status ({columns}) SELECT * FROM before")
    assert (await reconcile(conn, now, max_rows=100)).updated == len(PARTIAL)
    digests = {"said_facts": None, "kept_facts": None, "changes": None}
    healed = [dict(row) | digests for row in await conn.fetch(statuses)]
    assert healed == [one | digests for one in right]


async def test_a_repair_of_content_keeps_the_time_of_the_last_arrival(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The device's last heartbeat was a duplicate, which has no row in the history."""
    agent = await nexhb.agent("kiosk")
    await agent.live(now - 3 * MINUTE, battery={"pct": 50.0})
    await agent.live(now - 2 * MINUTE, battery={"pct": 60.0})
    await agent.live(now - 2 * MINUTE, received_at=now - MINUTE)
    await conn.execute(
        "UPDATE device_last_status SET last_ts = $1, received_at = $1, battery_pct = 50", now - 3 * MINUTE
    )
    assert (await reconcile(conn, now, max_rows=10)).updated == 1
    [found] = await conn.fetch("SELECT last_ts, battery_pct, heard_at FROM device_last_status")
    assert tuple(found) == (now - 2 * MINUTE, 60, now - MINUTE)


# ---- blackouts ------------------------------------------------------------------------------------------------------


async def test_nexhbs_own_outage_does_not_count_as_silence_of_the_fleet(
    start_daemon: StartDaemon, now: datetime
) -> None:
    """Formerly, if no daemon had run for 79 s and the threshold was a minute, the whole fleet was "offline"."""
    nexhb = await start_daemon(now=now, heartbeat=HeartbeatSettings(offline_after_seconds=60))
    await (await nexhb.agent("there")).live(now - timedelta(seconds=80))
    await (await nexhb.agent("gone before")).live(now - timedelta(seconds=140))
    async with nexhb.database.connected(application="test") as conn:
        assert await availability.renew(conn, now - timedelta(seconds=79)) is None
    found = await nexhb.get("/v1/devices/offline")  # the blackout has not ended yet
    assert (found["taking_heartbeats_since"], found["as_of"]) == (None, shown(now))
    assert [row["device_id"] for row in found["devices"]] == ["gone before"]
    async with nexhb.database.connected(application="test") as conn:
        assert await availability.renew(conn, now) is not None
    found = await nexhb.get("/v1/devices/offline")
    assert (found["taking_heartbeats_since"], found["count"]) == (shown(now), 1)
    assert found["devices"][0]["offline_seconds"] == 61
    there = await device(nexhb, "there")
    assert (there["online"], there["state"]) == (False, "unknown")
    # After the agent's longest wait, its interval and the rest of the minute, the device should have sent.
    nexhb.clock.fixed = now + AGENT_WAIT + MINUTE + timedelta(seconds=60)
    async with nexhb.database.connected(application="test") as conn:
        await conn.execute("UPDATE taking_heartbeats SET renewed_at = $1", nexhb.clock())
    assert await offline(nexhb) == ["gone before", "there"]
    fleet = await nexhb.get("/v1/fleet")
    assert (fleet["online"], fleet["offline"]) == (0, 2)


async def test_both_sources_count_a_blackout(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(now=now)
    for name, minutes in (("before", 100), ("meanwhile", 55), ("after", 9), ("after it, gone", 31)):
        await (await nexhb.agent(name)).live(now - minutes * MINUTE, unity_process_running=name != "meanwhile")
    await nexhb.rows("INSERT INTO taking_heartbeats (since, renewed_at) VALUES ($1, $2)", now - 40 * MINUTE, now)
    await nexhb.rows("INSERT INTO blackouts VALUES ($1, $2)", now - 60 * MINUTE, now - 40 * MINUTE)
    nexhb.clock.fixed = now - 26 * MINUTE
    fast = await nexhb.get("/v1/devices/offline")
    assert [row["device_id"] for row in fast["devices"]] == ["before"]
    fleet = await nexhb.get("/v1/fleet")
    assert [fleet[name] for name in ("online", "offline", "unknown", "unity_down", "unity_down_online")] == [
        2, 1, 1, 1, 0,
    ]  # fmt: skip
    nexhb.clock.fixed = now
    fast = await nexhb.get("/v1/devices/offline")
    await nexhb.rows("UPDATE feature_flags SET value = 'false' WHERE flag = 'read_from_last_status'")
    while (legacy := await nexhb.get("/v1/devices/offline"))["source"] != "legacy":
        pass
    assert legacy["devices"] == fast["devices"]


async def test_a_blackout_written_by_a_clock_that_was_ahead_is_deleted_once_the_clock_is_right(
    database: Database, conn: Connection, now: datetime
) -> None:
    """Otherwise the blackout would count four days later, and devices silent since then would become online again."""
    for moment in (now - 100 * MINUTE, now - 90 * MINUTE, now - 90 * MINUTE + timedelta(days=4), now):
        await availability.renew(conn, moment)
    kept = await conn.fetch("SELECT began_at, ended_at FROM blackouts")
    assert [tuple(row) for row in kept] == [(now - 100 * MINUTE, now - 90 * MINUTE)]


async def test_if_two_daemons_return_at_once_only_one_records_the_blackout(database: Database, now: datetime) -> None:
    async with database.connected(application="one") as one, database.connected(application="other") as other:
        await availability.renew(one, now - MINUTE)
        found = await asyncio.gather(*(availability.renew(conn, now) for conn in (one, other)))
        assert sorted(gap is None for gap in found) == [False, True]
        assert await one.fetchval("SELECT count(*) FROM blackouts") == 1


async def test_a_daemon_renews_while_it_accepts_heartbeats(nexhb: Nexhb, conn: Connection) -> None:
    async with daemon_module.running(nexhb.settings):
        while await conn.fetchval("SELECT count(*) FROM taking_heartbeats") == 0:
            pass
    since, renewed_at = await conn.fetchrow("SELECT since, renewed_at FROM taking_heartbeats")  # type: ignore[misc]
    assert since == renewed_at
    names = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb presence'"
    while await conn.fetchval(names):
        pass


async def test_a_daemon_that_cannot_commit_does_not_renew(database: Database, conn: Connection) -> None:
    takes = False
    keeper = availability.AvailabilityKeeper(database, DatabaseClock(), lambda: takes, lambda: None)
    await keeper._renew()
    assert await conn.fetchval("SELECT count(*) FROM taking_heartbeats") == 0
    takes = True
    await keeper._renew()
    assert await conn.fetchval("SELECT count(*) FROM taking_heartbeats") == 1
    await keeper._conn.close()


async def test_the_number_of_blackouts_read_is_limited_and_old_ones_are_deleted(
    conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "MAX_BLACKOUTS", 2)
    await conn.executemany(
        "INSERT INTO blackouts (began_at, ended_at) VALUES ($1, $2)",
        [(now - days * DAY, now - days * DAY + MINUTE) for days in (-1, 1, 2, 3, 401)],
    )
    assert [one.start for one in (await availability.read(conn, now, MINUTE)).blackouts] == [now - DAY, now - 2 * DAY]
    await availability.renew(conn, now - MINUTE)
    assert await availability.renew(conn, now)
    kept = await conn.fetch("SELECT began_at FROM blackouts WHERE began_at < $1 ORDER BY began_at", now - MINUTE)
    assert [row["began_at"] for row in kept] == [now - 3 * DAY, now - 2 * DAY, now - DAY]


# ---- the clock ------------------------------------------------------------------------------------------------------


async def test_the_daemons_clock_follows_the_databases_clock_not_the_hosts(conn: Connection) -> None:
    for days in (40, -3, 0):
        ahead = timedelta(days=days)
        host = DatabaseClock(lambda ahead=ahead: clock.system_now() + ahead)  # type: ignore[misc]
        # The daemon uses the host's clock until it has read the database's clock.
        assert abs(host() - clock.system_now() - ahead) < MINUTE
        await host.learn(conn)
        database = await conn.fetchval(sql.queries("clock")["clock"])
        assert abs(host() - database) < MINUTE
        assert abs(host.apart - ahead) < MINUTE
        assert bool(clock.apart_because(host.apart)) == bool(days)


async def test_time_advances_by_the_monotonic_clock_until_the_database_is_read_again(conn: Connection) -> None:
    passed, host_moves = 1_000.0, timedelta(0)
    one = DatabaseClock(lambda: clock.system_now() + host_moves, lambda: passed)
    await one.learn(conn)
    before = one()
    host_moves, passed = timedelta(days=365), passed + 90
    assert one() - before == timedelta(seconds=90)


def test_a_large_clock_difference_is_a_reason_not_to_be_ready() -> None:
    assert clock.apart_because(timedelta(minutes=-5)) == ""
    assert clock.apart_because(timedelta(minutes=5, seconds=1)).startswith("This host's clock is 301 s ahead of the")
    assert clock.apart_because(timedelta(days=-3)).startswith("This host's clock is 259200 s behind the database's")
