"""Apply the rules to one device: its changes since the last round, its silence, and the faults that are left. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from nexhb.config import Settings
from nexhb.devices.hours import Hours
from nexhb.devices.presence import Presence
from nexhb.ingest.batch import Noteworthy
from nexhb.watching import state as states
from nexhb.watching.incidents import Fault
from nexhb.watching.state import Change, Content, DeviceState, Flip, Habits, Thresholds


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of the watcher."""

    thresholds: Thresholds
    by_tag: Mapping[str, Thresholds] = field(default_factory=dict)
    interval: timedelta = timedelta(seconds=60)  # of a device whose interval is not known yet

    def of(self, tags: Collection[str]) -> Thresholds:
        """Return the thresholds of a device: those of the first of its tags, by name, that has its own."""
        return next((self.by_tag[tag] for tag in sorted(tags) if tag in self.by_tag), self.thresholds)

    @property
    def shortest_offline_after(self) -> timedelta:
        """The shortest silence after which any device is offline."""
        return min(each.offline_after for each in (self.thresholds, *self.by_tag.values()))

    @property
    def noteworthy(self) -> Noteworthy:
        """Which changes of a status the writer has to note."""
        battery_pct = max(each.battery_ok_pct for each in (self.thresholds, *self.by_tag.values()))
        return Noteworthy(battery_pct, self.shortest_offline_after)


def watch_rules(settings: Settings) -> Rules:
    """Return the rules that the settings state."""
    watch, heartbeat = settings.watch, settings.heartbeat
    offline_after = timedelta(seconds=heartbeat.offline_after_seconds)
    thresholds = Thresholds(offline_after, watch.battery_low_pct, watch.battery_ok_pct)
    by_tag = {
        each.tag: Thresholds(
            timedelta(seconds=each.offline_after_seconds or heartbeat.offline_after_seconds),
            each.battery_low_pct or watch.battery_low_pct,
            each.battery_ok_pct or watch.battery_ok_pct,
        )
        for each in watch.tags
    }
    return Rules(thresholds, by_tag, interval=timedelta(seconds=heartbeat.interval_seconds))


@dataclass(frozen=True, slots=True)
class Noted:
    """A change as the writer noted it, with the content of that moment."""

    change_no: int
    changes: Change
    content: Content


@dataclass(frozen=True, slots=True)
class Subject:
    """A device that is looked at in a round, and everything that is known of it."""

    device_no: int
    site: str | None
    active: bool  # neither revoked nor inactive
    hours: Hours
    thresholds: Thresholds
    state: DeviceState | None
    content: Content
    noted: Sequence[Noted] = ()
    habit: Habits | None = None  # learned in this round
    incidents: Mapping[str, int] = field(default_factory=dict)  # its open incidents: kind → incident_id


@dataclass(frozen=True, slots=True)
class Judgement:
    """The state of a device after a round, the changes, and its faults."""

    state: DeviceState
    flips: Sequence[Flip]
    faults: Sequence[Fault] = ()  # that belong to no incident yet
    ended: Collection[str] = ()  # kinds of incidents whose fault has ended


def judge(subject: Subject, rules: Rules, presence: Presence | None, now: datetime, *, complete: bool) -> Judgement:
    """Judge one device. Without `presence`, silence is not judged. `complete`: no later changes of this device are left
    for the next round, so that its present status may be judged too."""
    state, thresholds = subject.state, subject.thresholds
    is_new = state is None
    if state is None:
        state = states.first_state(subject.device_no, subject.noted[0].content if subject.noted else subject.content)
    was_due = state.due_at is not None and state.due_at <= now
    state = replace(state, due_at=None)
    habit = subject.habit or states.known_habits(state, rules.interval)
    flips: list[Flip] = []
    for noted in subject.noted:
        state, changed = states.heard_again(state, noted.content.heard_at)
        flips += changed
        if noted.changes & ~Change.HEARD:
            restarted = Change.RESTART in noted.changes
            state, changed = states.judge_content(state, noted.content, habit, thresholds, now, restarted=restarted)
            flips += changed
    if complete:
        state, changed = states.heard_again(state, subject.content.heard_at)
        flips += changed
        if is_new or was_due or states.is_late(subject.content, habit, thresholds):
            state, changed = states.judge_content(state, subject.content, habit, thresholds, now)
            flips += changed
    if presence is not None and subject.active:
        state, changed = states.judge_silence(state, subject.content, presence, habit, thresholds)
        flips += changed
    state, changed = states.judge_flapping(state, now)
    flips += changed
    return _with_faults(subject, state, flips, now, states.offline_after(thresholds, habit.interval))


def _with_faults(
    subject: Subject, state: DeviceState, flips: Sequence[Flip], now: datetime, limit: timedelta
) -> Judgement:
    present = dict(state.faults()) if subject.active else {}
    if state.flapping_since is not None and subject.active:
        present = {"flapping": state.flapping_since}
    ended = subject.incidents.keys() - present.keys() - {"token_shared"}
    faults = []
    for kind, since in present.items():
        if kind in state.adopted or kind in subject.incidents:
            continue
        at = _alarm_at(kind, subject, limit, now)
        if at is not None and at <= now:
            faults.append(Fault(subject.device_no, subject.site, kind, since))
        elif at is not None:
            state = states.look_again(state, at)
    return Judgement(state, flips, faults, ended)


def _alarm_at(kind: str, subject: Subject, limit: timedelta, now: datetime) -> datetime | None:
    """Return when a fault becomes an incident: at once while the site is open, otherwise when it opens. Silence counts
    in open time only, so that a device that is silent at opening gets the whole of its limit."""
    hours = subject.hours
    if not hours.is_open(now):
        opening = hours.next_change(now)
        return None if opening is None else opening
    if kind != "offline":
        return now
    silence = hours.open_time(subject.content.heard_at, now)
    return now + max(limit - silence, timedelta(0))
