"""Two kiosks that share a token are noticed; what one kiosk may go through is not taken for two."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from nexhb import twins, wire
from nexhb.twins import Kiosk, Twins
from tests.conftest import example

START = datetime(2026, 11, 24, 2, tzinfo=UTC)
RULES = wire.Rules("io.unitynodes.unityapp", 10, timedelta(days=7), timedelta(minutes=5))
OLD, NEW = START - timedelta(days=5), START - timedelta(hours=3)  # two boots


def heartbeat(minute: float, boot: datetime | None = OLD, device_no: int = 7, **changes: Any) -> wire.Heartbeat:
    """A heartbeat made then."""
    made = START + timedelta(minutes=minute)
    body = example(made)
    body["system"]["uptime_seconds"] = None if boot is None else (made - boot).total_seconds()
    for path, value in changes.items():
        section, _, name = path.partition("__")
        body[section][name] = value
    return wire.parse(orjson.dumps(body), device_no=device_no, device_id="k", received_at=made, rules=RULES)


def found(heartbeats: Iterable[wire.Heartbeat]) -> list[tuple[Kiosk, Kiosk]]:
    """What is noticed."""
    watched = Twins(10)
    return [pair for one in heartbeats if (pair := watched.look(one))]


@pytest.mark.parametrize(
    "other",
    [
        {"boot": NEW, "network__ip": "192.168.1.51"},
        {"boot": NEW},  # each behind its own NAT
        {"system__model": "SM-T510"},
        {"boot": None, "system__build_id": "TP1B"},
        {"network__ip": "192.168.1.51"},  # both came up with the power
    ],
)
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_two_that_take_turns_are_noticed(other: dict[str, Any], at_a_time: int) -> None:
    turns = (heartbeat(m, **(other if m // at_a_time % 2 else {})) for m in range(30))
    pairs = found(turns)
    assert pairs
    assert pairs[0][0] != pairs[0][1]
    assert {pair for pair in pairs[0] if pair.ip} == set(pairs[0])


def test_what_is_said_of_them_is_for_people() -> None:
    pair = found(heartbeat(m, NEW if m % 2 else OLD) for m in range(4))[0]
    assert pair[0].shown() == {
        "model": "SM-T500", "build_id": "TP1A.220624.014", "ip": "192.168.1.50", "booted_at": "2026-11-19T02:00:00Z",
    }  # fmt: skip


def test_what_one_kiosk_goes_through_is_not_two() -> None:
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
    leases = [heartbeat(m, network__ip=f"10.0.0.{min(m // 10, 4) % 2}") for m in range(60)]  # there and back twice
    for life in (reboots, roaming, upgrade, clock, seldom, dock, leases):
        assert found(life) == []


def test_a_queue_from_before_a_reboot_that_live_heartbeats_overtake_is_not_two() -> None:
    queue = [heartbeat(m, OLD) for m in range(30)]
    live = [heartbeat(40 + m, START + timedelta(minutes=35)) for m in range(30)]
    assert found(one for pair in zip(live, queue, strict=True) for one in pair) == []
    assert found([*queue, *live]) == []


def test_no_more_devices_are_watched_than_fit_and_silent_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "HELD", 3)
    watched = Twins(10)
    for number in range(5):
        watched.look(heartbeat(0, device_no=number))
    assert sorted(watched._seen) == [0, 1, 2]
    watched.look(heartbeat(70, device_no=9))
    assert sorted(watched._seen) == [9]


def test_a_full_watch_is_swept_now_and_then_and_not_for_each_device_that_is_not_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(twins, "HELD", 3)
    watched = Twins(10)
    for number in range(4):
        watched.look(heartbeat(0, device_no=number))
    swept = watched._seen
    for number in range(4, 9):
        watched.look(heartbeat(5, device_no=number))
    assert watched._seen is swept
    watched.look(heartbeat(7, device_no=9))
    assert watched._seen is not swept
