"""A short script, played to the real watcher: it finds what the rules say, and not if it breaks one of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bench.sim.compare import differences
from bench.sim.play import play
from bench.sim.script import CLOCK, FLAT, LINE, MINUTE, POWER, UNITY, Kiosk, Script, Truth
from nexhb.devices.presence import Presence, SilenceFilter
from nexhb.postgres.connections import Database
from nexhb.watching import causes, incidents, state

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
    return Script(1, datetime(2026, 3, 28, 12, tzinfo=UTC), 150 * MINUTE, kiosks, [(30 * MINUTE, 45 * MINUTE)])


async def test_the_watcher_finds_the_truth(database: Database) -> None:
    found = await play(short_script(), database)
    assert differences(short_script(), found) == []
    assert {row["cause"] for row in found.outages} >= {"network", "battery", "power"}
    assert {(row["kind"], row["scope"]) for row in found.incidents} >= {("offline", "site"), ("flapping", "device")}


def _whole_silence(presence: Presence, heard_at: datetime) -> timedelta:
    return presence.now - heard_at


def _whole_filter(presence: Presence, threshold: timedelta) -> SilenceFilter:
    return SilenceFilter(presence.now - threshold)


def _power_before_battery(gap: causes.Gap, judge: Any = causes._cause) -> str:
    cause: str = judge(gap)
    return causes.POWER if cause == causes.BATTERY else cause


# What is broken: the kiosks that show it, and the functions that are replaced.
BROKEN: dict[str, tuple[tuple[int, ...], list[tuple[Any, str, Any]]]] = {
    "late content counts as live": ((2,), [(state, "is_late", lambda *_: False)]),
    "outages of ours count as silence": (
        (6,), [(Presence, "silence", _whole_silence), (Presence, "silent_for", _whole_filter)],
    ),
    "no incident of a site": ((1, 3), [(incidents.Affected, "is_site", lambda *_: False)]),
    "power before battery": ((4,), [(causes, "_cause", _power_before_battery)]),
    "a return is not noticed": ((7,), [(state, "heard_again", lambda known, _: (known, []))]),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_watcher_that_breaks_a_rule_is_caught(
    broken: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, replacements = BROKEN[broken]
    for where, name, instead in replacements:
        monkeypatch.setattr(where, name, instead)
    script = short_script(*numbers)
    assert differences(script, await play(script, database)) != []
