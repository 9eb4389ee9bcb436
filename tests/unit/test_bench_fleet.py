"""The simulated fleet sends the bodies of real agents, as often as the schedule requires."""

from __future__ import annotations

import io
import json
import re
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from bench.fleet import (
    BUCKET_US,
    MICROS,
    UNITY_PACKAGE,
    Device,
    Schedule,
    body_us,
    gson,
    make_fleet,
    replays,
    schedule,
    write_csv,
)
from nexhb.ingest.parser import HeartbeatRules, parse

MADE_US = 1_795_485_600_123_456
FLEET = make_fleet(300, seed=7)
BEATS = 40


def all_bodies() -> list[tuple[Device, int, bytes]]:
    """Return the first heartbeats of every device, 61.000001 s apart, so that fractions of all lengths appear."""
    found = []
    for device in FLEET:
        for beat in range(BEATS):
            made_us = device.made_us(MADE_US + beat * 61_000_001)
            found.append((device, made_us, body_us(device, made_us, beat)))
    return found


BODIES = all_bodies()


def test_the_same_seed_gives_the_same_devices_and_a_small_fleet_is_the_head_of_a_large_one() -> None:
    assert make_fleet(300, seed=7) == FLEET
    assert make_fleet(10, seed=7) == FLEET[:10]
    assert make_fleet(10, seed=8) != FLEET[:10]


def test_devices_have_an_identity_of_their_own() -> None:
    assert len({device.device_id for device in FLEET}) == len({device.token for device in FLEET}) == 300
    assert FLEET[2].alias == "Store 1 - kiosk 3"
    for device in FLEET:
        assert str(UUID(device.device_id)) == device.device_id
        assert len(urlsafe_b64decode(device.token + "=")) == 32
        assert device.token not in repr(device)


def test_the_fleet_is_varied() -> None:
    assert len({device.system["model"] for device in FLEET}) >= 6
    assert {"wifi", "ethernet", "cell"} <= {device.network["transport"] for device in FLEET}
    assert {device.resolution_us for device in FLEET} == {1, 1000}
    assert any(device.nanos for device in FLEET)
    assert any(not device.has_unity for device in FLEET)


def test_every_body_is_a_heartbeat_to_the_daemon_and_has_the_recorded_ts() -> None:
    rules = HeartbeatRules(UNITY_PACKAGE, 10, timedelta(days=7), timedelta(minutes=5))
    for device, made_us, raw in BODIES:
        made_at = datetime.fromtimestamp(made_us // MICROS, UTC) + timedelta(microseconds=made_us % MICROS)
        found = parse(raw, device_no=1, device_id=device.device_id, received_at=made_at, rules=rules)
        assert found.ts == made_at
        assert not found.clock_wrong
        assert found.claimed_device_id is None
        assert found.dropped == ()
        assert found.facts.alias == device.alias
        assert found.battery_pct is not None
        assert found.uptime_s is not None
        assert found.ram_used_mb is not None


def test_bodies_have_gsons_shape() -> None:
    timestamps = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.(\d{3}|\d{6}|\d{9}))?Z")
    for _, _, raw in BODIES:
        found = json.loads(raw, parse_constant=pytest.fail)
        assert timestamps.fullmatch(found["timestamp_utc"])
        assert None not in _values(found)
        for part in ("battery", "system", "memory", "network"):
            assert not any(type(value) is int for value in _values(found[part])), part
        assert 0 <= found["battery"]["pct"] <= 100
        assert found["memory"]["avail_ram_mb"] <= found["memory"]["total_ram_mb"]
        assert -1 <= found["monitored_foreground_recent_s"] <= 86_400
        assert type(found["app_versions"][UNITY_PACKAGE]["installed"]) is bool


def test_values_change_over_time() -> None:
    found = [json.loads(raw) for _, _, raw in BODIES]
    assert {body["battery"]["charging"] for body in found} == {True, False}
    assert {body.get("unity_process_running") for body in found} == {True, False, None}
    assert {len(body["timestamp_utc"]) for body in found} == {24, 27, 30}
    drained = {body["battery"]["pct"] for body in found if body["device_id"] == _discharging().device_id}
    assert len(drained) > BEATS // 3
    assert any("signal_dbm" in body for body in found)
    assert any("signal_dbm" in body["network"] for body in found)
    assert any(body["system"]["uptime_seconds"] >= 1e7 for body in found)


def test_a_timestamp_takes_as_many_digits_as_it_needs() -> None:
    milli = next(device for device in FLEET if device.resolution_us == 1000)
    micro = next(device for device in FLEET if device.resolution_us == 1 and not device.nanos)
    whole_us = MADE_US - 123_456
    assert b'"2026-11-24T02:00:00Z"' in body_us(milli, milli.made_us(whole_us + 456), 0)
    assert b'"2026-11-24T02:00:00.123Z"' in body_us(milli, milli.made_us(MADE_US), 0)
    assert b'"2026-11-24T02:00:00.120Z"' in body_us(micro, whole_us + 120_000, 0)
    assert b'"2026-11-24T02:00:00.123456Z"' in body_us(micro, MADE_US, 0)


def test_text_is_escaped_as_gson_escapes_it() -> None:
    assert gson("Joe's <Café> & k=1").decode() == r'"Joe\u0027s \u003cCafé\u003e \u0026 k\u003d1"'


def test_the_csv_has_the_identities() -> None:
    file = io.StringIO()
    write_csv(FLEET, file)
    header, first, *_ = file.getvalue().splitlines()
    assert header == "device_id,alias,token"
    assert first == f"{FLEET[0].device_id},{FLEET[0].alias},{FLEET[0].token}"


def test_each_device_sends_once_an_interval_at_its_own_phase() -> None:
    plan = schedule(200, 60, 0, 180, seed=3)
    assert len(plan) == rows(plan) == 600
    assert list(plan.offset_us) == sorted(plan.offset_us)
    assert len({offset % 60_000_000 for offset in plan.offset_us}) == 200


def test_jitter_moves_heartbeats_but_keeps_the_rate() -> None:
    plan = schedule(2000, 60, 15, 60, seed=3)
    assert 1900 < len(plan) < 2100
    assert rows(plan) == len(plan)
    first_third = sum(offset < 20_000_000 for offset in plan.offset_us)
    assert 0.28 < first_third / len(plan) < 0.38


def test_the_same_seed_gives_the_same_schedule() -> None:
    first, second, other = (schedule(50, 60, 15, 60, seed, duplicate_factor=2.5) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_duplicates_stay_in_their_bucket_and_give_the_share_asked_for() -> None:
    once = schedule(500, 60, 0, 60, seed=3)
    plan = schedule(500, 60, 0, 60, seed=3, duplicate_factor=6.7)
    assert rows(plan) == rows(once) == 500
    assert 1 - rows(plan) / len(plan) == pytest.approx(0.85, abs=0.01)
    # the copies in a bucket differ by more than a millisecond, the resolution of some devices' clocks
    stamps = {(device, offset // 1000) for device, offset in zip(plan.device, plan.offset_us, strict=True)}
    assert len(stamps) > 0.99 * len(plan)


def test_returning_devices_bring_a_queue_of_old_heartbeats_oldest_first() -> None:
    back = replays(2000, 60, 30, 1, seed=3)
    assert [replay.device for replay in back] == list(range(2000))
    for replay in back:
        assert 0 <= replay.start_us < MICROS
        assert len({made // BUCKET_US for made in replay.made_us}) == 30
        assert list(replay.made_us) == sorted(replay.made_us)
        assert replay.made_us[-1] < 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval_s": 0},
        {"jitter_s": -1},
        {"duration_s": 0},
        {"duplicate_factor": 0.5},
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    asked: dict[str, Any] = {"interval_s": 60, "jitter_s": 0, "duration_s": 60} | wrong
    with pytest.raises(ValueError, match="interval and duration"):
        schedule(10, seed=1, **asked)


def rows(plan: Schedule) -> int:
    """Return how many rows a server must store: one per device and bucket."""
    return len({(device, offset // BUCKET_US) for device, offset in zip(plan.device, plan.offset_us, strict=True)})


def _values(found: object) -> list[object]:
    """Return every value in a JSON document that is neither an object nor an array."""
    if isinstance(found, dict):
        return [inner for value in found.values() for inner in _values(value)]
    if isinstance(found, list):
        return [inner for value in found for inner in _values(value)]
    return [found]


def _discharging() -> Device:
    """Return a device whose battery level changes with each heartbeat."""
    return next(device for device in FLEET if device.battery_step == 2)
