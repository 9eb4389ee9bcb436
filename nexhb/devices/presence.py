"""Decide which devices are online. A device is online while its silence does not exceed the threshold. Silence is the
time since its last heartbeat, without the time in which nexhb could not receive heartbeats. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

RENEW_INTERVAL_S = 5.0
# The gap that two missed renewals leave. A shorter gap is only a restart: an agent that received 503 during it sends
# again within 20 s.
MIN_BLACKOUT = timedelta(seconds=10)
AGENT_WAIT = timedelta(seconds=375)  # the agent's longest pause between two attempts: 300 s plus a quarter of jitter
MAX_CLOCK_AHEAD = timedelta(minutes=1)  # a time further in the future was written by a wrong clock


@dataclass(frozen=True)
class ServicePeriod:
    """The time since which daemons accept heartbeats, and when a daemon last confirmed this (renewal)."""

    since: datetime
    renewed_at: datetime


@dataclass(frozen=True)
class Span:
    """The time `start` ≤ t < `end`."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class SilenceFilter:
    """Matches devices that have been silent for too long: those last heard before `before`, but not in a span of
    `except_in`."""

    before: datetime
    except_in: Sequence[Span] = ()

    @property
    def multirange(self) -> str:
        """`except_in` as PostgreSQL's tstzmultirange."""
        return "{" + ",".join(f"[{span.start.isoformat()},{span.end.isoformat()})" for span in self.except_in) + "}"

    @property
    def matched(self) -> str:
        """The times of the last heartbeat that match, as PostgreSQL's tstzmultirange."""
        spans, start = [], ""
        for span in sorted(self.except_in, key=lambda span: span.start):
            spans.append(f"[{start},{span.start.isoformat()})")
            start = span.end.isoformat()
        return "{" + ",".join([*spans, f"[{start},{self.before.isoformat()})"]) + "}"


@dataclass(frozen=True)
class Presence:
    """What determines the silence of devices at `now`. A blackout is a time in which no daemon accepted heartbeats."""

    now: datetime
    in_service_since: datetime | None  # None while no daemon accepts heartbeats
    blackouts: Sequence[Span] = ()  # newest first; a blackout that has not ended ends at `now`
    agent_wait: timedelta = AGENT_WAIT  # the time after a blackout within which every agent sends again

    def silence(self, heard_at: datetime) -> timedelta:
        """Return how long a device last heard at `heard_at` has been silent. Later blackouts do not count, nor does the
        agent's longest wait after each blackout."""
        silence, counted_from = max(self.now - heard_at, timedelta(0)), self.now
        for blackout in self.blackouts:
            if blackout.end <= heard_at:
                break
            end, start = min(blackout.end + self.agent_wait, counted_from), max(blackout.start, heard_at)
            silence -= max(end - start, timedelta(0))
            counted_from = min(counted_from, start)
        return silence

    def silent_for(self, threshold: timedelta) -> SilenceFilter:
        """Return the filter for devices whose silence exceeds `threshold`."""
        before = cutoff = self._cutoff(0, threshold)
        except_in: list[Span] = []
        for number, blackout in enumerate(self.blackouts, 1):
            if blackout.end + self.agent_wait < cutoff:
                break  # every device last heard before this blackout is offline anyway
            # A device last heard before the end of this blackout, but after the cutoff, is not offline.
            cutoff = self._cutoff(number, threshold)
            if cutoff < blackout.end:
                except_in.append(Span(cutoff, blackout.end))
        return _simplified(before, except_in)

    def is_online(self, heard_at: datetime, threshold: timedelta) -> bool:
        """Return whether a device was heard within `threshold`, whatever the blackouts were."""
        return self.now - heard_at <= threshold

    def state(self, heard_at: datetime, threshold: timedelta) -> str:
        """Return whether a device last heard at `heard_at` is online, offline or unknown."""
        if self.is_online(heard_at, threshold):
            return "online"
        return "offline" if self.silence(heard_at) > threshold else "unknown"

    def heard_in(self, state: str, threshold: timedelta) -> str:
        """Return the times at which the devices in a state were last heard, as PostgreSQL's tstzmultirange."""
        silent, cutoff = self.silent_for(threshold), self.now - threshold
        if state == "online":
            return f"{{[{cutoff.isoformat()},)}}"
        if state == "offline":
            return silent.matched
        between = (Span(silent.before, cutoff),) if silent.before < cutoff else ()
        return SilenceFilter(cutoff, (*between, *silent.except_in)).multirange

    def _cutoff(self, blackouts: int, threshold: timedelta) -> datetime:
        """Return the moment that is `threshold` before now, not counting the first `blackouts` blackouts and the wait
        after each."""
        counted_from, remaining = self.now, threshold
        for blackout in self.blackouts[:blackouts]:
            end = min(blackout.end + self.agent_wait, counted_from)
            if counted_from - end > remaining:
                break
            remaining -= counted_from - end
            counted_from = min(counted_from, blackout.start)
        return counted_from - remaining


def _simplified(before: datetime, except_in: Sequence[Span]) -> SilenceFilter:
    """Return an equivalent filter whose exceptions do not overlap and end before `before`."""
    merged: list[Span] = []
    for span in sorted(except_in, key=lambda span: span.end, reverse=True):
        if span.end >= before:
            before = min(before, span.start)
        elif merged and span.end >= merged[-1].start:
            merged[-1] = Span(min(span.start, merged[-1].start), merged[-1].end)
        else:
            merged.append(span)
    return SilenceFilter(before, tuple(merged))


def renewed_period(period: ServicePeriod | None, now: datetime) -> tuple[ServicePeriod, Span | None]:
    """Return the period that a ready daemon stores at `now`, and the blackout that the renewal ends, if any."""
    if period is None or period.renewed_at - now > MAX_CLOCK_AHEAD:
        return ServicePeriod(now, now), None
    if now - period.renewed_at > MIN_BLACKOUT:
        return ServicePeriod(now, now), Span(period.renewed_at, now)
    return ServicePeriod(period.since, max(period.renewed_at, now)), None


def presence_at(
    now: datetime, period: ServicePeriod | None, blackouts: Sequence[Span], interval: timedelta
) -> Presence:
    """Return the presence at `now`. `blackouts` are given newest first; `interval` is the time between two heartbeats
    of a device. A blackout that ends in the future was written by a wrong clock and does not count."""
    spans = [
        Span(blackout.start, min(blackout.end, now))
        for blackout in blackouts
        if blackout.start < now and blackout.end - now <= MAX_CLOCK_AHEAD
    ]
    in_blackout = period is not None and now - period.renewed_at > MIN_BLACKOUT
    if period is not None and in_blackout:
        spans.insert(0, Span(period.renewed_at, now))
    since = None if period is None or in_blackout else period.since
    return Presence(now, since, tuple(spans), AGENT_WAIT + interval)
