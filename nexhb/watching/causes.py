"""Judge why a device was silent, from the heartbeats around the gap and from those that arrived later. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nexhb.devices.presence import AGENT_WAIT, Span

FLAT_BATTERY_PCT = 5
AGENT_QUEUE = 500  # the agent keeps its newest 500 heartbeats
# The boot time (ts less uptime) varies by the rounding of both and by corrections of the clock.
BOOT_SLACK = timedelta(seconds=60)

OURS, SITE, BATTERY, POWER, NETWORK, APP, UNKNOWN = "ours", "site", "battery", "power", "network", "app", "unknown"


@dataclass(frozen=True, slots=True)
class Last:
    """The last heartbeat before a gap."""

    heard_at: datetime
    ts: datetime
    battery_pct: int | None
    plugged: bool | None

    @property
    def was_flat(self) -> bool:
        """Whether the battery was almost empty and not being charged."""
        return self.plugged is False and self.battery_pct is not None and self.battery_pct <= FLAT_BATTERY_PCT


@dataclass(frozen=True, slots=True)
class First:
    """The first live heartbeat after a gap."""

    heard_at: datetime
    ts: datetime
    uptime_s: int | None


@dataclass(frozen=True, slots=True)
class Gap:
    """The silence of a device, and the number of heartbeats that were made in it and arrived after it."""

    before: Last
    after: First
    interval: timedelta
    replayed: int = 0
    blackouts: Sequence[Span] = ()

    @property
    def length(self) -> timedelta:
        """The time between the two heartbeats, by the database's clock."""
        return self.after.heard_at - self.before.heard_at

    @property
    def ours(self) -> timedelta:
        """The part of the gap in which nexhb accepted no heartbeats."""
        start, end = self.before.heard_at, self.after.heard_at
        spans = (min(span.end, end) - max(span.start, start) for span in self.blackouts)
        return sum((length for length in spans if length > timedelta(0)), timedelta(0))

    @property
    def expected(self) -> int:
        """The number of heartbeats that the device would have made in the gap."""
        return max(1, int((self.after.ts - self.before.ts) / self.interval) - 1)

    @property
    def restarted(self) -> bool | None:
        """Whether the device booted within the gap; None if it does not report its uptime."""
        if self.after.uptime_s is None:
            return None
        return self.after.ts - timedelta(seconds=self.after.uptime_s) > self.before.ts + BOOT_SLACK


def first_guess(last: Last) -> str:
    """Return the cause that is assumed while a device is silent and its site is not."""
    return BATTERY if last.was_flat else UNKNOWN


def preliminary(gap: Gap, guess: str) -> str:
    """Return the cause that is known when the first heartbeat arrives, before the agent has sent its queue; the first
    guess if nothing else is known."""
    cause = _cause(gap)
    return cause if cause in (OURS, BATTERY, POWER) else guess


def judge(gap: Gap) -> tuple[str, Mapping[str, Any]]:
    """Return the cause of a gap, with its evidence. The first that fits, in this order: ours, battery, power, network,
    app."""
    evidence = {
        "battery_pct": gap.before.battery_pct,
        "plugged": gap.before.plugged,
        "restarted": gap.restarted,
        "replayed": gap.replayed,
        "expected": gap.expected,
        "ours_s": round(gap.ours.total_seconds()),
    }
    return _cause(gap), evidence


def _cause(gap: Gap) -> str:
    if gap.ours * 2 > gap.length:
        return OURS
    if gap.restarted:
        return BATTERY if gap.before.was_flat else POWER
    if gap.replayed * 2 >= min(gap.expected, AGENT_QUEUE):
        return NETWORK
    return APP if gap.restarted is False and gap.replayed == 0 else UNKNOWN


def settles_after(interval: timedelta) -> timedelta:
    """Return how long after the first live heartbeat the agent has certainly sent its queue."""
    return AGENT_WAIT + interval
