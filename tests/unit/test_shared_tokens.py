"""Two kiosks that share a token are detected; the ordinary changes of a single kiosk are not mistaken for two."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from nexhb.devices import shared_tokens
from nexhb.devices.shared_tokens import Kiosk, SharedTokenDetector
from nexhb.heartbeat import Heartbeat
from nexhb.ingest import parser
from tests.conftest import example

START = datetime(2026, 11, 24, 2, tzinfo=UTC)
RULES = parser.HeartbeatRules("io.unitynodes.unityapp", 10, timedelta(days=7), timedelta(minutes=5))
OLD, NEW = START - timedelta(days=5), START - timedelta(hours=3)  # two boots


def heartbeat(minute: float, boot: datetime | None = OLD, device_no: int = 7, **changes: Any) -> Heartbeat:
    """Return a heartbeat made `minute` minutes after START."""
    made = START + timedelta(minutes=minute)
    body = example(made)
    body["system"]["uptime_seconds"] = None if boot is None else (made - boot).total_seconds()
    for path, value in changes.items():
        section, _, name = path.partition("__")
        body[section][name] = value
    return parser.parse(orjson.dumps(body), device_no=device_no, device_id="k", received_at=made, rules=RULES)


def detect(heartbeats: Iterable[Heartbeat]) -> list[tuple[Kiosk, Kiosk]]:
    """Return the pairs that are detected."""
    detector = SharedTokenDetector(10)
    return [pair for heartbeat in heartbeats if (pair := detector.check(heartbeat))]


@pytest.mark.parametrize(
    "other",
    [
        {"boot": NEW, "network__ip": "192.168.1.51"},
        {"boot": NEW},  # each kiosk is behind its own NAT, with the same local address
        {"system__model": "SM-T510"},
        {"boot": None, "system__build_id": "TP1B"},
        {"network__ip": "192.168.1.51"},  # both kiosks booted when the power returned
    ],
)
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_two_kiosks_whose_heartbeats_alternate_are_detected(other: dict[str, Any], at_a_time: int) -> None:
    pairs = detect(heartbeat(m, **(other if m // at_a_time % 2 else {})) for m in range(30))
    assert pairs
    assert pairs[0][0] != pairs[0][1]
    assert {pair for pair in pairs[0] if pair.ip} == set(pairs[0])


def test_a_detected_kiosk_is_shown_in_readable_form() -> None:
    pair = detect(heartbeat(m, NEW if m % 2 else OLD) for m in range(4))[0]
    assert pair[0].shown() == {
        "model": "SM-T500", "build_id": "TP1A.220624.014", "ip": "192.168.1.50", "booted_at": "2026-11-19T02:00:00Z",
    }  # fmt: skip


def test_the_changes_of_a_single_kiosk_are_not_mistaken_for_two() -> None:
    reboots = [heartbeat(m, START + timedelta(minutes=m - m % 5) - timedelta(minutes=1)) for m in range(60)]
    roaming = [heartbeat(m, network__ip=f"10.0.{m % 2}.1", network__ssid=f"net-{m % 2}") for m in range(60)]
    upgrade = [
        heartbeat(m, network__ip="10.0.0.1" if m < 9 else "10.0.0.2", system__build_id=f"b{m // 30}") for m in range(60)
    ]
    clock = [heartbeat(m, OLD + timedelta(seconds=m % 2 * 200)) for m in range(60)]
    seldom = [heartbeat(40 * m, NEW if m % 2 else OLD) for m in range(60)]
    dock = [
        heartbeat(m, network__ip=f"10.0.0.{m % 2}", network__ssid=None, network__transport=("ethernet", "cell")[m % 2])
        for m in range(60)
    ]
    leases = [heartbeat(m, network__ip=f"10.0.0.{min(m // 10, 4) % 2}") for m in range(60)]  # changes several times
    for life in (reboots, roaming, upgrade, clock, seldom, dock, leases):
        assert detect(life) == []


def test_a_queue_from_before_a_reboot_that_live_heartbeats_overtake_is_not_mistaken_for_a_second_kiosk() -> None:
    queue = [heartbeat(m, OLD) for m in range(30)]
    live = [heartbeat(40 + m, START + timedelta(minutes=35)) for m in range(30)]
    assert detect(heartbeat for pair in zip(live, queue, strict=True) for heartbeat in pair) == []
    assert detect([*queue, *live]) == []


def test_the_number_of_watched_devices_is_limited_and_silent_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tokens, "MAX_DEVICES", 3)
    detector = SharedTokenDetector(10)
    for number in range(5):
        detector.check(heartbeat(0, device_no=number))
    assert sorted(detector._seen) == [0, 1, 2]
    detector.check(heartbeat(70, device_no=9))
    assert sorted(detector._seen) == [9]


def test_a_full_detector_is_swept_at_intervals_and_not_for_each_unwatched_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_tokens, "MAX_DEVICES", 3)
    detector = SharedTokenDetector(10)
    for number in range(4):
        detector.check(heartbeat(0, device_no=number))
    swept = detector._seen
    for number in range(4, 9):
        detector.check(heartbeat(5, device_no=number))
    assert detector._seen is swept
    detector.check(heartbeat(7, device_no=9))
    assert detector._seen is not swept
