"""One heartbeat, from the socket to the row and to the operator's reads."""

from __future__ import annotations

from datetime import datetime, timedelta

from tests.conftest import Nexhb, shown, timestamp


async def test_a_heartbeat_is_committed_with_every_column_and_read_back(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.send(now)
    assert answer.status == 200
    assert answer.body == {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": False}

    [row] = await nexhb.rows("SELECT * FROM heartbeat_history")
    assert row["device_id"] == agent.device_id
    assert row["ts"] == now
    assert abs(row["received_at"] - nexhb.clock()) < timedelta(seconds=30)
    expected = {
        "battery_pct": 87, "plugged": True, "temp_c": 31.5, "network_type": "wifi", "ssid": "Store-42",
        "signal_dbm": None, "uptime_s": 12345678, "ram_used_mb": 1837, "unity_pkg_version": "2.1.0",
        "unity_running": True, "agent_version": "1.0.9", "clock_wrong": False,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert str(row["ip"]) == "192.168.1.50"

    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert {key: status[key] for key in expected} == expected
    assert status["last_ts"] == shown(now)
    assert status["ip"] == "192.168.1.50"
    assert (status["alias"], status["model"], status["sdk_int"]) == ("Store 42 - kiosk 3", "SM-T500", 33)

    history = await nexhb.get(f"/v1/devices/{agent.device_id}/heartbeats")
    assert [beat["ts"] for beat in history["heartbeats"]] == [shown(now)]


async def test_the_first_heartbeat_of_a_bucket_becomes_the_row_and_the_newest_the_status(
    nexhb: Nexhb, now: datetime
) -> None:
    agent = await nexhb.agent()
    start = now.replace(second=0, microsecond=0)
    answers = [
        await agent.send(start + timedelta(seconds=second), battery={"pct": float(50 + second)})
        for second in (3, 5, 1, 10)
    ]
    assert [answer.body["deduplicated"] for answer in answers] == [False, True, True, False]
    rows = await nexhb.rows("SELECT ts, battery_pct FROM device_heartbeats ORDER BY ts")
    assert [(row["ts"], row["battery_pct"]) for row in rows] == [
        (start + timedelta(seconds=3), 53),
        (start + timedelta(seconds=10), 60),
    ]
    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert (status["last_ts"], status["battery_pct"]) == (shown(start + timedelta(seconds=10)), 60)


async def test_a_duplicate_that_is_newer_still_updates_the_status(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    start = now.replace(second=0, microsecond=0)
    await agent.send(start + timedelta(seconds=1), battery={"pct": 50.0})
    answer = await agent.send(start + timedelta(seconds=9), battery={"pct": 40.0})
    assert answer.body["deduplicated"]
    assert (await nexhb.get(f"/v1/devices/{agent.device_id}"))["battery_pct"] == 40


async def test_an_old_heartbeat_is_stored_and_does_not_replace_a_newer_status(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    await agent.send(now, battery={"pct": 40.0}, alias="new name")
    answer = await agent.send(now - timedelta(hours=30), battery={"pct": 90.0}, alias="old name")
    assert answer.body["deduplicated"] is False
    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert (status["battery_pct"], status["alias"]) == (40, "new name")
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2


async def test_a_replayed_queue_keeps_its_own_timestamps(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    made = [now - timedelta(minutes=minute) for minute in range(3000, 0, -60)]
    for moment in made:
        assert (await agent.send(moment)).status == 200
    rows = await nexhb.rows("SELECT ts FROM device_heartbeats ORDER BY ts")
    assert [row["ts"] for row in rows] == made
    assert (await nexhb.get(f"/v1/devices/{agent.device_id}"))["last_ts"] == shown(made[-1])


async def test_a_heartbeat_outside_the_window_is_stored_with_the_time_of_receipt_and_marked(nexhb: Nexhb) -> None:
    before = await nexhb.metric("nexhb_heartbeats_clock_outside_window_total")
    for wrong in ("1970-01-01T00:00:00Z", "2099-01-01T00:00:00.000Z", "0001-01-01T00:00:00+14:00"):
        agent = await nexhb.agent()
        assert (await agent.send(nexhb.clock(), timestamp_utc=wrong)).status == 200
        [row] = await nexhb.rows("SELECT * FROM heartbeat_history WHERE device_id = $1", agent.device_id)
        assert row["clock_wrong"]
        assert row["ts"] == row["received_at"]
    assert await nexhb.metric("nexhb_heartbeats_clock_outside_window_total") == before + 3
    names = await nexhb.rows("SELECT partition_name FROM hb_partitions WHERE range_start < '2000-01-01'")
    assert names == []


async def test_a_time_may_have_nine_decimals_an_offset_or_no_fraction(nexhb: Nexhb, now: datetime) -> None:
    moment = now.replace(microsecond=0)
    for text in (
        timestamp(moment, 0),
        timestamp(moment, 9),
        timestamp(moment, 3),
        f"{moment + timedelta(hours=2):%Y-%m-%dT%H:%M:%S}+02:00",
    ):
        agent = await nexhb.agent()
        assert (await agent.send(now, timestamp_utc=text)).status == 200
        [row] = await nexhb.rows("SELECT ts FROM heartbeat_history WHERE device_id = $1", agent.device_id)
        assert row["ts"] == moment


async def test_unknown_and_unused_fields_are_ignored_whatever_they_contain(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.send(
        now, self_heal_hints=["x"], fcm_token=7, power_ok="maybe", queue_depth="many", brand_new={"a": [1, None]}
    )
    assert answer.status == 200


async def test_a_body_with_only_a_timestamp_is_a_heartbeat(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(b'{"timestamp_utc":"%s"}' % timestamp(now).encode())
    assert answer.status == 200
    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert status["unity_running"] is None
    assert status["battery_pct"] is None


async def test_the_valid_items_of_a_queue_are_stored_and_the_others_named(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    beat = '{"timestamp_utc":"%s"}'
    items = [
        beat % timestamp(now - timedelta(minutes=2)),
        '{"battery":{"pct":5}}',
        beat % timestamp(now - timedelta(minutes=1)),
        beat % timestamp(now - timedelta(minutes=1)),
        "{",
    ]
    answer = await agent.post("\n".join(items).encode(), "/v1/heartbeats", **{"Content-Type": "application/x-ndjson"})
    assert answer.status == 200
    assert (answer.body["written"], answer.body["deduplicated"]) == (2, 1)
    assert [(refusal["index"], refusal["errors"][0]["path"]) for refusal in answer.body["refused"]] == [
        (1, "timestamp_utc"),
        (4, ""),
    ]
    again = await agent.post(f"[{items[0]},{items[2]}]".encode(), "/v1/heartbeats")
    assert (again.body["written"], again.body["deduplicated"]) == (0, 2)


async def test_the_counters_add_up_to_the_received_heartbeats(nexhb: Nexhb, now: datetime) -> None:
    names = (
        "heartbeats_ingested_total", "hb_writes_total", "hb_dedupe_total", "nexhb_heartbeats_refused_total",
        "nexhb_heartbeats_failed_total",
    )  # fmt: skip
    before = [await nexhb.metric(name) for name in names]
    agent = await nexhb.agent()
    await agent.send(now)
    await agent.send(now)
    await agent.post(b"{}")
    after = [await nexhb.metric(name) for name in names]
    assert [new - old for old, new in zip(before, after, strict=True)] == [3, 1, 1, 1, 0]
