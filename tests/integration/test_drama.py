"""A short simulation with the real watcher and teller: what they record and send agrees with the rules, and a watcher
that breaks one of the rules is detected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bench.sim.compare import differences
from bench.sim.play import play
from bench.sim.script import CLOCK, FLAT, LINE, MINUTE, POWER, UNITY, Kiosk, Script, Silence, Truth
from nexhb.devices.presence import Presence, SilenceFilter
from nexhb.messages import deciding, telling
from nexhb.messages.deciding import Present
from nexhb.messages.message import OPENED, RESOLVED
from nexhb.postgres.connections import Database
from nexhb.watching import causes, device_days, incidents, state, uptime

pytestmark = pytest.mark.usefixtures("no_days")

# What happens to each kiosk: kind, from minute, until minute.
HAPPENS: dict[int, list[tuple[str, int, int]]] = {
    1: [(LINE, 70, 130)],
    2: [(LINE, 70, 130), (UNITY, 80, 105)],
    3: [(LINE, 70, 130)],
    4: [(FLAT, 100, 130)],
    5: [(UNITY, 60, 75), (UNITY, 110, 112), (UNITY, 114, 116), (UNITY, 118, 120)],
    6: [(CLOCK, 90, 110)],
    7: [(POWER, 80, 100)],
    8: [],
}


def short_script(*numbers: int) -> Script:
    """Return two and a half hours of these kiosks, or of all eight, in two sites."""
    kiosks = [
        Kiosk(
            number, "site-00" if number < 4 else "site-01", number > 6, 600.0 if number == 8 else 60.0, 0.2,
            number == 2, 1e9, [Truth(kind, start * MINUTE, end * MINUTE) for kind, start, end in happens],
        )
        for number, happens in HAPPENS.items() if not numbers or number in numbers
    ]  # fmt: skip
    silences = [
        Silence("site", "site-00", 60 * MINUTE, 100 * MINUTE),  # the first half of what happens there
        Silence("device", "kiosk-0007", 70 * MINUTE, 125 * MINUTE),  # all of what happens to it
    ]
    return Script(
        1, datetime(2026, 3, 28, 12, tzinfo=UTC), 150 * MINUTE, kiosks, [(30 * MINUTE, 45 * MINUTE)], silences,
        [(95 * MINUTE, 105 * MINUTE)],
    )  # fmt: skip


async def test_the_watcher_finds_the_truth_and_tells_it(database: Database) -> None:
    found = await play(short_script(), database)
    assert differences(short_script(), found) == []
    assert {row["cause"] for row in found.outages} >= {"network", "battery", "power"}
    assert {(row["kind"], row["scope"]) for row in found.incidents} >= {("offline", "site"), ("flapping", "device")}
    assert {each.summary for each in found.received if each.path == "/urgent"} == {
        ("incident.opened", "3 devices of site site-00 are offline"),
        ("incident.resolved", "Resolved: 3 devices of site site-00 are online again"),
    }
    assert {each.summary[0] for each in found.received if each.path == "/ours"} == {
        "nexhb.not_ready", "nexhb.ready", "incident.opened", "incident.resolved",
    }  # fmt: skip
    assert "incident.reminder" in {each.summary[0] for each in found.received if each.path == "/stores"}
    assert not any("kiosk-0007" in each.summary[1] for each in found.received)


def _whole_silence(presence: Presence, heard_at: datetime) -> timedelta:
    return presence.now - heard_at


def _whole_filter(presence: Presence, threshold: timedelta) -> SilenceFilter:
    return SilenceFilter(presence.now - threshold)


def _power_before_battery(gap: causes.Gap, judge: Any = causes._cause) -> str:
    cause: str = judge(gap)
    return causes.POWER if cause == causes.BATTERY else cause


def _told_in_every_round(present: Present, *args: Any, **how: Any) -> str | None:
    kind = deciding.due(present, *args, **how)
    return OPENED if kind is None and present.is_open and how["matches"] and not how["held"] else kind


def _no_recovery(*args: Any, **how: Any) -> str | None:
    kind = deciding.due(*args, **how)
    return None if kind == RESOLVED else kind


# What is broken: the kiosks that show it, and the functions that are replaced.
BROKEN: dict[str, tuple[tuple[int, ...], list[tuple[Any, str, Any]]]] = {
    "late content counts as live": ((2,), [(state, "is_late", lambda *_: False)]),
    "outages of ours count as silence": (
        (6,), [(Presence, "silence", _whole_silence), (Presence, "silent_for", _whole_filter)],
    ),
    "no incident of a site": ((1, 3), [(incidents.Affected, "is_site", lambda *_: False)]),
    "power before battery": ((4,), [(causes, "_cause", _power_before_battery)]),
    "a power cut counts as a lost line": ((7,), [(uptime, "OFF", uptime.REPLAYED)]),
    "an outage of ours counts as uptime": ((6,), [(device_days, "_merged", lambda _rows: [])]),
    "a return is not noticed": ((7,), [(state, "heard_again", lambda known, _: (known, []))]),
    "told twice": ((4,), [(telling, "due", _told_in_every_round)]),
    "no recovery": ((4,), [(telling, "due", _no_recovery)]),
    "no silences": ((7,), [(telling, "_is_held", lambda *_: False)]),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_rule_that_is_broken_is_caught(
    broken: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, replacements = BROKEN[broken]
    for where, name, instead in replacements:
        monkeypatch.setattr(where, name, instead)
    script = short_script(*numbers)
    assert differences(script, await play(script, database)) != []
