"""The watcher turns heartbeats and silence into events, outages and incidents."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import orjson
import pytest

from nexhb import metrics
from nexhb.devices import registry
from nexhb.errors import StateChanged
from nexhb.jobs.reconcile import reconcile
from nexhb.postgres.connections import Connection
from nexhb.watching import adopting, counts, judging, retention, rounds
from nexhb.watching.judging import Judgement, Subject
from tests.conftest import StartDaemon, example, shown
from tests.support.watching import MINUTE, Watched


@pytest.fixture
async def watched(start_daemon: StartDaemon, conn: Connection, now: datetime) -> Watched:
    """A daemon whose rounds the test runs, and a fleet without kiosks."""
    return await Watched.start(start_daemon, conn, now)


async def test_a_silent_kiosk_is_an_outage_until_it_is_heard_again(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(10, silent=["a"])
    assert await watched.events() == []
    await watched.minutes(1, silent=["a"])
    assert await watched.events() == [("a", "offline", "unknown")]
    assert await watched.incidents() == [("offline", "device", None, "unknown", 1, False)]
    watched.kiosks["a"].booted_at = watched.now
    await watched.minutes(1)
    assert await watched.events() == [("a", "offline", "unknown"), ("a", "online", "power"), ("a", "rebooted", None)]
    assert await watched.incidents() == [("offline", "device", None, "power", 1, True)]


async def test_a_queue_that_arrives_later_shows_that_the_line_was_down(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(3)
    queued = [
        example(watched.now + n * MINUTE, **watched.kiosks["a"].body(watched.now + n * MINUTE)) for n in range(1, 15)
    ]
    await watched.minutes(14, silent=["a"])
    await watched.minutes(1)
    assert await watched.events() == [("a", "offline", "unknown"), ("a", "online", "unknown")]
    answer = await watched.kiosks["a"].agent.post(orjson.dumps(queued), "/v1/heartbeats")
    assert answer.body["written"] == 14
    await watched.minutes(8)
    assert await watched.incidents() == [("offline", "device", None, "network", 1, True)]
    assert await watched.conn.fetchval("SELECT cause FROM device_outages") == "network"
    assert len(await watched.events()) == 2


async def test_a_whole_site_is_one_incident(watched: Watched) -> None:
    await watched.add(*(f"s{n}" for n in range(4)), site="store-42")
    await watched.add(*(f"t{n}" for n in range(6)), site="store-43")
    await watched.minutes(2)
    down = [f"s{n}" for n in range(4)]
    await watched.minutes(12, silent=down)
    assert await watched.incidents() == [("offline", "site", "store-42", "site", 4, False)]
    assert {cause for _, _, cause in await watched.events()} == {"site"}
    await watched.minutes(1)
    assert await watched.incidents() == [("offline", "site", "store-42", "site", 4, True)]


async def test_over_half_of_the_fleet_in_two_sites_is_one_incident(watched: Watched) -> None:
    await watched.add("a1", "a2", site="a")
    await watched.add("b1", "b2", "b3", site="b")
    await watched.minutes(2)
    await watched.minutes(13, silent=["a1", "a2", "b1", "b2"])
    assert await watched.incidents() == [("offline", "fleet", None, "unknown", 4, False)]
    await watched.minutes(1)
    assert await watched.incidents() == [("offline", "fleet", None, "unknown", 4, True)]


async def test_a_second_silent_site_makes_it_the_fleet_at_once(watched: Watched) -> None:
    await watched.add("a1", "a2", site="a")
    await watched.add("b1", "b2", site="b")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a1", "a2"])
    await watched.minutes(12, silent=["a1", "a2", "b1", "b2"])
    assert [incident[:3] for incident in await watched.incidents()] == [("offline", "fleet", None)]


async def test_an_incident_widens_when_more_devices_fall_silent(watched: Watched) -> None:
    await watched.add("a1", "a2", "a3", site="a")
    await watched.add("b1", "b2", "b3", "b4", site="b")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a1"])
    assert await watched.incidents() == [("offline", "device", "a", "unknown", 1, False)]
    await watched.minutes(12, silent=["a1", "a2"])
    assert await watched.incidents() == [("offline", "site", "a", "site", 2, False)]
    assert {row["incident_id"] for row in await watched.conn.fetch("SELECT incident_id FROM device_outages")} == {1}


async def test_a_site_is_back_when_over_half_of_it_is_and_the_rest_goes_on(watched: Watched) -> None:
    await watched.add("a1", "a2", "a3", site="a")
    await watched.add("b1", "b2", "b3", "b4", site="b")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a1", "a2", "a3"])
    await watched.minutes(6, silent=["a1"])
    assert await watched.incidents() == [("offline", "site", "a", "site", 3, False)]
    await watched.minutes(3, silent=["a1"])
    assert await watched.incidents() == [
        ("offline", "site", "a", "app", 3, True), ("offline", "device", "a", "site", 1, False),
    ]  # fmt: skip
    named = await watched.conn.fetchval("SELECT evidence->>'remaining_devices' FROM incidents WHERE incident_id = 1")
    continues = await watched.conn.fetchval("SELECT continues FROM incidents WHERE incident_id = 2")
    assert (named, continues) == ('["a1"]', 1)


async def test_states_of_the_content_make_events_and_incidents(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    kiosk = watched.kiosks["a"]
    kiosk.changes = {"unity_process_running": False, "battery": {"pct": 15.0, "charging": False}}
    await watched.minutes(1)
    kiosk.changes = {"battery": {"pct": 19.0, "charging": True}, "app_version": "1.1.0"}
    await watched.minutes(1)
    kiosk.changes = {"battery": {"pct": 20.0, "charging": True}, "app_version": "1.1.0"}
    await watched.minutes(1)
    assert [kind for _, kind, _ in await watched.events()] == [
        "unity_down", "battery_low", "app_changed", "unity_up", "battery_ok",
    ]  # fmt: skip
    assert await watched.incidents() == [
        ("battery_low", "device", None, None, 1, True), ("unity_down", "device", None, None, 1, True),
    ]  # fmt: skip


async def test_six_changes_within_an_hour_are_flapping_and_nothing_else(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(1)
    for number in range(8):
        watched.kiosks["a"].changes = {"unity_process_running": number % 2 == 1}
        await watched.minutes(1)
    kinds = [(row[0], row[1], row[-1]) for row in await watched.incidents()]
    assert kinds.count(("unity_down", "device", True)) == 3
    assert [kind for kind in kinds if kind[0] == "flapping"] == [("flapping", "device", False)]
    await watched.minutes(61)
    assert all(resolved for *_, resolved in await watched.incidents())


async def test_flapping_replaces_the_incident_that_is_open_when_it_begins(watched: Watched) -> None:
    """A kiosk that flaps has no other fault, and so its incident was resolved before the flapping could replace it: the
    end was told, and a route that does not receive flapping was told nothing of what followed."""
    await watched.add("a", "b", "c")
    await watched.minutes(1)
    for number in range(6):
        watched.kiosks["a"].changes = {"unity_process_running": number % 2 == 1}
        await watched.minutes(1)
    rows = await watched.conn.fetch("SELECT kind, absorbed_into, members FROM incidents ORDER BY incident_id")
    flapping = ("flapping", None, 1)
    assert [tuple(row) for row in rows] == [("unity_down", None, 0)] * 2 + [("unity_down", 4, 0), flapping]


async def test_hours_that_arrive_late_change_no_state(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    start = watched.now
    await watched.minutes(30, silent=["a"])
    late = {"unity_process_running": False, "battery": {"pct": 3.0}}
    times = [start + n * MINUTE for n in range(1, 15)]
    queue = [example(at, **watched.kiosks["a"].body(at) | late) for at in times]
    await watched.kiosks["a"].agent.post(orjson.dumps(queue), "/v1/heartbeats")
    await watched.round()
    assert [kind for _, kind, _ in await watched.events()] == ["offline", "online"]
    await watched.minutes(12)
    assert [kind for _, kind, _ in await watched.events()] == ["offline", "online"]
    # A live heartbeat with the values of the late ones is a change all the same.
    watched.kiosks["a"].changes = {"unity_process_running": False}
    await watched.minutes(1)
    assert [kind for _, kind, _ in await watched.events()][-1] == "unity_down"


async def test_the_first_round_adopts_what_it_finds(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    watched.kiosks["b"].changes = {"unity_process_running": False}
    await watched.minutes(2)
    assert [kind for _, kind, _ in await watched.events()] == ["unity_down"]
    await watched.minutes(15, silent=["a"])
    before = await watched.events()
    await watched.conn.execute("UPDATE watch SET database = 'another'")  # as after a restore
    await watched.minutes(20, silent=["a"])
    assert await watched.events() == before
    assert all(resolved for *_, resolved in await watched.incidents())
    await watched.minutes(1)
    assert (await watched.events())[len(before) :] == [("a", "online", None)]


async def test_an_outage_of_ours_makes_no_device_offline(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    began, watched.now = watched.now, watched.now + 60 * MINUTE
    await watched.conn.execute("INSERT INTO blackouts VALUES ($1, $2)", began, watched.now)
    watched.nexhb.clock.fixed = watched.now
    await watched.round()
    await watched.minutes(5, silent=["a", "b"])
    await watched.minutes(1, silent=["a"])
    assert await watched.events() == []
    await watched.minutes(15, silent=["a"])
    assert [event[:2] for event in await watched.events()] == [("a", "offline")]


async def test_revoking_a_device_ends_its_incidents_quietly(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a"])
    await registry.revoke(watched.conn, "a", watched.now)
    await watched.minutes(1, silent=["a"])
    assert await watched.conn.fetchval("SELECT quiet AND resolved_at IS NOT NULL FROM incidents")
    assert [kind for _, kind, _ in await watched.events()] == ["offline"]


async def test_a_state_that_another_daemon_has_changed_is_not_written(watched: Watched) -> None:
    """Two daemons can judge the same devices if one has lost its lock unnoticed."""
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    [row] = await watched.conn.fetch("SELECT * FROM device_state WHERE device_no = 1")
    states = [rounds._state(row)]
    await rounds.write_states(watched.conn, {1: row["revision"]}, states)
    with pytest.raises(StateChanged):
        await rounds.write_states(watched.conn, {1: row["revision"]}, states)


async def test_events_incidents_and_timelines_can_be_read(watched: Watched) -> None:
    await watched.add("a", "b", "c", site="store-42")
    await watched.minutes(2)
    silent_since = watched.now
    await watched.minutes(12, silent=["a"])
    await watched.minutes(1)
    nexhb = watched.nexhb
    page = await nexhb.get("/v1/events?limit=1")
    assert [event["kind"] for event in page["events"]] == ["online"]
    [event] = (await nexhb.get(f"/v1/events?limit=1&after={page['next']}"))["events"]
    assert (event["kind"], event["device_id"], event["site"], event["since"]) == (
        "offline", "a", "store-42", shown(silent_since),
    )  # fmt: skip
    follow = await nexhb.get("/v1/events?order=asc&kind=offline")
    assert [each["event_id"] for each in follow["events"]] == [event["event_id"]]
    assert (await nexhb.get(f"/v1/events?order=asc&after={follow['next']}&kind=offline"))["events"] == []
    assert (await nexhb.get("/v1/incidents"))["incidents"] == []
    [incident] = (await nexhb.get("/v1/incidents?state=all&site=store-42"))["incidents"]
    assert (incident["scope"], incident["named"], incident["devices"]) == ("device", ["a"], 1)
    found = await nexhb.get("/v1/devices/a/timeline")
    assert [each["state"] for each in found["intervals"]] == ["unknown", "online", "offline", "online"]
    assert found["intervals"][2]["since"] == shown(silent_since)
    await nexhb.get("/v1/events?kind=sad", status=400)
    await nexhb.get("/v1/events?device=nobody", status=404)
    await nexhb.get("/v1/devices/nobody/timeline", status=404)


async def test_a_shared_token_is_an_incident_until_it_is_no_longer_seen(watched: Watched) -> None:
    await watched.add("a")
    await watched.minutes(1)
    await watched.conn.execute("INSERT INTO shared_tokens VALUES (1, $1, $1, '[]')", watched.now)
    await watched.minutes(1)
    assert await watched.events() == [("a", "token_shared", None)]
    assert await watched.incidents() == [("token_shared", "device", None, None, 1, False)]
    await watched.minutes(60)
    assert len(await watched.events()) == 1
    assert await watched.incidents() == [("token_shared", "device", None, None, 1, True)]


async def test_what_a_reconciliation_repairs_is_judged(watched: Watched) -> None:
    """A repair noted no change, and the next heartbeat was compared with the repaired status: the watcher did not learn
    that Unity had stopped, or that a device was heard again."""
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(12, silent=["b"])
    await watched.conn.execute("CREATE TEMP TABLE before AS SELECT * FROM device_last_status")
    watched.now += MINUTE
    watched.nexhb.clock.fixed = watched.now
    watched.kiosks["a"].changes = {"unity_process_running": False}
    for kiosk in watched.kiosks.values():
        assert (await kiosk.agent.send(watched.now, **kiosk.body(watched.now))).status == 200
    await watched.conn.execute("DELETE FROM device_changes")
    await watched.conn.execute(
        "UPDATE device_last_status s SET heard_at = b.heard_at, last_ts = b.last_ts, received_at = b.received_at, "
        "unity_running = b.unity_running FROM before b WHERE b.device_no = s.device_no"
    )
    repaired = await reconcile(watched.conn, watched.now, max_rows=100)
    assert repaired.updated == 3
    await watched.minutes(1)
    assert [event for event in await watched.events() if event[1] != "offline"] == [
        ("a", "unity_down", None), ("b", "online", "unknown"),
    ]  # fmt: skip


async def test_metrics_count_the_fleet_the_sites_and_the_open_incidents(watched: Watched) -> None:
    await watched.add("a", "b", "c", site="store-42")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a"])
    await counts.update_metrics(watched.conn)
    assert metrics.fleet_devices.labels(state="offline")._value.get() == 1
    assert metrics.site_devices.labels(site="store-42", state="online")._value.get() == 2
    assert metrics.incidents_open.labels(scope="device")._value.get() == 1


async def test_metrics_name_each_site_that_is_down_until_it_is_back(watched: Watched) -> None:
    await watched.add("a", "b", "c", site="store-42")
    await watched.add("d", "e", "f", site="store-43")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a", "b", "d"])
    await counts.update_metrics(watched.conn)
    [family] = metrics.site_incidents_open.collect()
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"site": "store-42", "kind": "offline"}, 1)
    ]
    await watched.minutes(2)
    await counts.update_metrics(watched.conn)
    [family] = metrics.site_incidents_open.collect()
    assert family.samples == []


async def test_old_events_outages_and_incidents_are_deleted(watched: Watched) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)
    await watched.minutes(12, silent=["a"])
    await watched.minutes(10)
    kept = watched.now
    await watched.minutes(12, silent=["b"])
    assert await retention.prune(watched.conn, kept - 60 * MINUTE) == 0
    assert await retention.prune(watched.conn, kept) == 4  # two events, an outage, an incident
    assert [event[:2] for event in await watched.events()] == [("b", "offline")]
    assert await watched.incidents() == [("offline", "device", None, "unknown", 1, False)]
    await watched.minutes(1)


async def test_a_device_that_cannot_be_judged_does_not_hide_the_others(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watched.add("a", "b", "c")
    await watched.minutes(2)

    def failing(subject: Subject, *args: Any, **options: Any) -> Judgement:
        if subject.device_no == 2:
            raise ZeroDivisionError
        return judging.judge(subject, *args, **options)

    monkeypatch.setattr(rounds, "judge", failing)
    failures = metrics.watch_failures._value.get()
    await watched.minutes(13, silent=["a", "b"])
    assert [event[:2] for event in await watched.events()] == [("a", "offline")]
    assert metrics.watch_failures._value.get() > failures
    monkeypatch.undo()
    await watched.conn.execute("UPDATE device_state SET due_at = now() - interval '1 year' WHERE device_no = 2")
    await watched.round()
    assert [event[:2] for event in await watched.events()] == [("a", "offline"), ("b", "offline")]


async def test_both_ways_to_adopt_a_state_are_equal(watched: Watched) -> None:
    """The statement for ordinary devices follows the rules of adopted_state."""
    await watched.add(*"abcdef")
    changes: list[dict[str, Any]] = [
        {}, {"unity_process_running": False}, {"battery": {"pct": 15.0}}, {"battery": {}},
        {"timestamp_utc": "2020-01-01T00:00:00Z"},
        {"app_versions": {}, "unity_process_running": None, "monitored_foreground_recent_s": -1},
    ]  # fmt: skip
    for kiosk, values in zip(watched.kiosks.values(), changes, strict=True):
        kiosk.changes = values
    await watched.minutes(1)
    rows = "SELECT * FROM device_state ORDER BY device_no"
    found = []
    for tags in ([], ["tagged"]):  # with a tag that has thresholds, a device is judged one by one
        await watched.conn.execute("UPDATE devices SET tags = $1", tags)
        await watched.conn.execute("DELETE FROM watch")
        watched.watcher._rules = replace(watched.rules, by_tag={"tagged": watched.rules.thresholds})
        await watched.round()
        found.append(
            [dict(row) | {"interval_s": None, "skew_s": None, "revision": 0} for row in await watched.conn.fetch(rows)]
        )
    assert found[0] == found[1]
    assert {kind for row in found[0] for kind in row["adopted"]} == {"unity_down", "battery_low", "clock_wrong"}


async def test_an_adoption_that_takes_long_is_not_a_clock_that_was_moved(
    start_daemon: StartDaemon, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To adopt a million devices took 40 s. The next round compared the times from before and after it, took the clock
    for moved, and judged no silence for ten minutes."""
    watched = await Watched.start(start_daemon, conn, now)
    await watched.add("k1", "k2", "k3")
    await watched.minutes(2)
    await watched.minutes(5, silent=["k1"])
    adopt = adopting.adopt_if_needed

    async def slowly(*arguments: Any, **options: Any) -> None:
        await adopt(*arguments, **options)
        watched.now += MINUTE
        watched.nexhb.clock.fixed = watched.now

    monkeypatch.setattr(adopting, "adopt_if_needed", slowly)
    await watched.round()
    monkeypatch.setattr(adopting, "adopt_if_needed", adopt)
    await watched.minutes(6, silent=["k1"])
    assert ("k1", "offline", "unknown") in await watched.events()
