"""Decide which states of a device changed: its presence, Unity, the battery and the clock. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from statistics import median_low
from typing import Any

from nexhb.devices.presence import Presence

HOUR = timedelta(hours=1)
FLAPPING_FLIPS = 6  # changes of presence or of Unity within an hour
INTERVALS_OFFLINE = 2.5  # a device with a long interval is offline after this many intervals
INTERVALS_OVERDUE = 1.5
RECHECK = timedelta(minutes=2)  # when to look again at a status that was made long before it was received
FLIPS = frozenset({"offline", "online", "unity_down", "unity_up"})


class Change(enum.IntFlag):
    """In which respect a heartbeat changed the status of its device, as the writer notes it in device_changes."""

    UNITY = 1
    BATTERY = 2
    CLOCK = 4
    VERSION = 8
    RESTART = 16  # the uptime fell
    HEARD = 32  # after a long silence
    FIRST = 64


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a device counts as offline, and its battery as low."""

    offline_after: timedelta
    battery_low_pct: int  # low at this charge or less
    battery_ok_pct: int  # no longer low at this charge or more


@dataclass(frozen=True, slots=True)
class Habits:
    """How often a device sends heartbeats, and how long after a heartbeat is made it usually arrives."""

    interval: timedelta
    skew: timedelta


@dataclass(frozen=True, slots=True)
class Content:
    """What the newest heartbeat of a device states, and when the device was last heard."""

    heard_at: datetime
    ts: datetime
    received_at: datetime
    clock_wrong: bool
    uptime_s: int | None
    battery_pct: int | None
    plugged: bool | None
    unity_running: bool | None
    agent_version: str | None
    unity_pkg_version: str | None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What the watcher has established about a device: the row of device_state."""

    device_no: int
    presence: str  # online | offline
    presence_since: datetime
    unity: str | None  # running | down
    unity_since: datetime | None
    battery: str | None  # ok | low
    battery_since: datetime | None
    clock: str  # right | wrong
    clock_since: datetime
    agent_version: str | None
    unity_pkg_version: str | None
    interval_s: float | None = None  # None: not learned yet
    skew_s: float | None = None
    flips: tuple[datetime, ...] = ()  # within the last hour
    flapping_since: datetime | None = None
    adopted: tuple[str, ...] = ()  # the incident kinds of the present states for which no incident is opened
    due_at: datetime | None = None  # when to look at the device again, even if it does nothing

    def faults(self) -> Mapping[str, datetime]:
        """Return the kinds of incident for which the present states are a reason, each with its beginning."""
        since = {
            "offline": self.presence_since if self.presence == "offline" else None,
            "unity_down": self.unity_since if self.unity == "down" else None,
            "battery_low": self.battery_since if self.battery == "low" else None,
            "clock_wrong": self.clock_since if self.clock == "wrong" else None,
        }
        return {kind: at for kind, at in since.items() if at is not None}


@dataclass(frozen=True, slots=True)
class Flip:
    """A change that becomes an event."""

    device_no: int
    kind: str
    since: datetime
    evidence: Mapping[str, Any] = field(default_factory=dict)


def habits(ts: Sequence[datetime], received_at: Sequence[datetime], known: Habits) -> Habits:
    """Return the habits of a device from its last heartbeats, by ts, newest first; what they do not show stays as
    `known`. The interval is the median of the distances between them. The skew is the median delay of the heartbeats
    that arrived one by one: those of a replayed queue arrive together, and their delays mean nothing."""
    pairs = list(zip(ts, ts[1:], received_at, received_at[1:], strict=False))
    distances = [newer - older for newer, older, _, _ in pairs]
    delays = [
        received - newer
        for newer, older, received, received_before in pairs
        if received - received_before >= (newer - older) / 2
    ]
    interval = max(median_low(distances), timedelta(seconds=1)) if distances else known.interval
    return Habits(interval, median_low(delays) if len(delays) >= 3 else known.skew)


def known_habits(state: DeviceState, default_interval: timedelta) -> Habits:
    """Return the habits that were learned of a device, or the default."""
    interval = default_interval if state.interval_s is None else timedelta(seconds=state.interval_s)
    return Habits(interval, timedelta(seconds=state.skew_s or 0))


def offline_after(thresholds: Thresholds, interval: timedelta) -> timedelta:
    """Return the silence after which a device is offline."""
    return max(thresholds.offline_after, INTERVALS_OFFLINE * interval)


def first_state(device_no: int, content: Content) -> DeviceState:
    """Return the state of a device that was heard for the first time. Its Unity app counts as unknown, so that a first
    heartbeat without a running app is a change."""
    return DeviceState(
        device_no, "online", content.heard_at, None, None, None, None, "right", content.received_at,
        content.agent_version, content.unity_pkg_version,
    )  # fmt: skip


def adopted_state(
    device_no: int, content: Content, presence: Presence, habit: Habits, thresholds: Thresholds
) -> DeviceState:
    """Return the state of a device in the first round, which takes everything as it is: faults open no incident."""
    silent = presence.silence(content.heard_at) > offline_after(thresholds, habit.interval)
    state = first_state(device_no, content)
    state, _ = judge_content(state, content, habit, thresholds, presence.now)
    state = replace(
        state,
        presence="offline" if silent else "online",
        interval_s=habit.interval.total_seconds(),
        skew_s=habit.skew.total_seconds(),
        flips=(),
    )
    return replace(state, adopted=tuple(state.faults()))


def is_late(content: Content, habit: Habits, thresholds: Thresholds) -> bool:
    """Return whether the heartbeat was made long before it was received, so that it does not describe the present."""
    return content.received_at - content.ts - habit.skew > thresholds.offline_after


def judge_content(
    state: DeviceState,
    content: Content,
    habit: Habits,
    thresholds: Thresholds,
    now: datetime,
    *,
    restarted: bool = False,
) -> tuple[DeviceState, list[Flip]]:
    """Return the state after a heartbeat, and what changed. A heartbeat that arrived late changes no state: the next
    one that arrives in time does."""
    number = state.device_no
    flips = []
    if restarted and content.uptime_s is not None:
        booted_at = content.ts - timedelta(seconds=content.uptime_s)
        flips.append(Flip(number, "rebooted", booted_at, {"uptime_s": content.uptime_s}))
    if is_late(content, habit, thresholds):
        return look_again(state, now + RECHECK), flips
    at = content.received_at
    versions = {"agent_version": content.agent_version, "unity_pkg_version": content.unity_pkg_version}
    changed = {
        name: {"from": before, "to": value}
        for name, value in versions.items()
        if value is not None and (before := getattr(state, name)) != value
    }
    if any(change["from"] is not None for change in changed.values()):
        flips.append(Flip(number, "app_changed", at, changed))
    state = replace(state, **{name: change["to"] for name, change in changed.items()})
    unity = {True: "running", False: "down", None: state.unity}[content.unity_running]
    if unity != state.unity:
        if unity == "down" or state.unity is not None:
            flips.append(Flip(number, "unity_down" if unity == "down" else "unity_up", at))
        state = replace(state, unity=unity, unity_since=at)
    battery = _battery(state.battery, content.battery_pct, thresholds)
    if battery != state.battery:
        if battery == "low" or state.battery == "low":
            evidence = {"battery_pct": content.battery_pct, "plugged": content.plugged}
            flips.append(Flip(number, f"battery_{battery}", at, evidence))
        state = replace(state, battery=battery, battery_since=at)
    clock = "wrong" if content.clock_wrong else "right"
    if clock != state.clock:
        flips.append(Flip(number, f"clock_{clock}", at))
        state = replace(state, clock=clock, clock_since=at)
    return _without_adopted(_count_flips(state, flips, at)), flips


def _battery(known: str | None, pct: int | None, thresholds: Thresholds) -> str | None:
    if pct is None:
        return known
    if pct <= thresholds.battery_low_pct:
        return "low"
    return "ok" if known != "low" or pct >= thresholds.battery_ok_pct else "low"


def judge_silence(
    state: DeviceState, content: Content, presence: Presence, habit: Habits, thresholds: Thresholds
) -> tuple[DeviceState, list[Flip]]:
    """Return the state of a device that may have become silent, or that was heard again, and the change."""
    limit = offline_after(thresholds, habit.interval)
    silence = presence.silence(content.heard_at)
    state = replace(state, interval_s=habit.interval.total_seconds(), skew_s=habit.skew.total_seconds())
    if state.presence == "online" and silence > limit:
        state = replace(state, presence="offline", presence_since=content.heard_at)
        flips = [Flip(state.device_no, "offline", content.heard_at)]
        return _count_flips(state, flips, presence.now), flips
    if state.presence == "online" and silence > min(limit, thresholds.offline_after):
        return look_again(state, presence.now + (limit - silence)), []
    return state, []


def heard_again(state: DeviceState, heard_at: datetime) -> tuple[DeviceState, list[Flip]]:
    """Return the state of a device that was heard at `heard_at`, and the change if it was offline until then."""
    if state.presence == "online" or heard_at <= state.presence_since:
        return state, []
    flips = [Flip(state.device_no, "online", heard_at)]
    state = replace(state, presence="online", presence_since=heard_at)
    return _without_adopted(_count_flips(state, flips, heard_at)), flips


def judge_flapping(state: DeviceState, now: datetime) -> tuple[DeviceState, list[Flip]]:
    """Return the state with the beginning or the end of flapping, and the change if flapping begins."""
    recent = tuple(at for at in state.flips if now - at < HOUR)
    if len(recent) != len(state.flips):
        state = replace(state, flips=recent)
    if state.flapping_since is not None:
        if not recent:
            return replace(state, flapping_since=None), []
        return look_again(state, recent[-1] + HOUR), []
    if len(recent) < FLAPPING_FLIPS:
        return state, []
    state = look_again(replace(state, flapping_since=recent[0]), recent[-1] + HOUR)
    return state, [Flip(state.device_no, "flapping", recent[0], {"flips": len(recent)})]


def _count_flips(state: DeviceState, flips: Sequence[Flip], at: datetime) -> DeviceState:
    counted = [at for flip in flips if flip.kind in FLIPS]
    return replace(state, flips=(*state.flips, *counted)[-2 * FLAPPING_FLIPS :]) if counted else state


def look_again(state: DeviceState, at: datetime) -> DeviceState:
    """Return the state with a time at which the device is looked at again, unless it already has an earlier one."""
    return replace(state, due_at=at if state.due_at is None else min(state.due_at, at))


def _without_adopted(state: DeviceState) -> DeviceState:
    """Return the state without the adopted faults that have ended."""
    left = tuple(kind for kind in state.adopted if kind in state.faults())
    return state if left == state.adopted else replace(state, adopted=left)
