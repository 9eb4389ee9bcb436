"""Who is there. A device is online while its silence is not longer than the threshold, and silence is the time since it
was last heard in which nexhb could have heard it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

RENEW_S = 5.0
# Two renewals missed. Shorter gaps are restarts: an agent that hears 503 for so long is back after 20 s at the most.
GAP = timedelta(seconds=10)
AGENT_WAIT = timedelta(seconds=375)  # the longest pause of the agent between two tries: 300 s and a quarter of jitter
AHEAD_MOST = timedelta(minutes=1)  # what lies further ahead was written by a clock that was wrong


@dataclass(frozen=True)
class Taking:
    """Since when heartbeats are taken, and when that was last confirmed."""

    since: datetime
    renewed_at: datetime


@dataclass(frozen=True)
class Span:
    """`start` ≤ t < `end`."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class Silent:
    """The devices that are silent for too long: last heard before `before`, and in none of `but_not`."""

    before: datetime
    but_not: Sequence[Span] = ()

    @property
    def multirange(self) -> str:
        """`but_not` as PostgreSQL's tstzmultirange."""
        return "{" + ",".join(f"[{one.start.isoformat()},{one.end.isoformat()})" for one in self.but_not) + "}"


@dataclass(frozen=True)
class Presence:
    """How silence is counted at `now`."""

    now: datetime
    taking_since: datetime | None  # null while no daemon takes heartbeats
    blackouts: Sequence[Span] = ()  # newest first; one that lasts ends now
    agent_wait: timedelta = AGENT_WAIT  # after a blackout, until every agent has come again

    def silence(self, heard_at: datetime) -> timedelta:
        """How long a device has been silent that was last heard at `heard_at`: without the blackouts since then, and
        without the agent's longest wait after each of them."""
        silent, counted = max(self.now - heard_at, timedelta(0)), self.now
        for blackout in self.blackouts:
            if blackout.end <= heard_at:
                break
            end, start = min(blackout.end + self.agent_wait, counted), max(blackout.start, heard_at)
            silent -= max(end - start, timedelta(0))
            counted = min(counted, start)
        return silent

    def silent(self, longer_than: timedelta) -> Silent:
        """The devices whose silence is longer than that, by when they were heard."""
        before = cutoff = self._cutoff(0, longer_than)
        but_not: list[Span] = []
        for number, blackout in enumerate(self.blackouts, 1):
            if blackout.end + self.agent_wait < cutoff:
                break  # it lies before all that is not offline
            # Of the devices that were last heard before this blackout's end, those since the cutoff are not offline.
            cutoff = self._cutoff(number, longer_than)
            if cutoff < blackout.end:
                but_not.append(Span(cutoff, blackout.end))
        return _tidied(before, but_not)

    def _cutoff(self, blackouts: int, longer_than: timedelta) -> datetime:
        """The moment since which `longer_than` has passed, not counting the newest `blackouts` and the waits after."""
        counted, left = self.now, longer_than
        for blackout in self.blackouts[:blackouts]:
            end = min(blackout.end + self.agent_wait, counted)
            if counted - end > left:
                break
            left -= counted - end
            counted = min(counted, blackout.start)
        return counted - left


def _tidied(before: datetime, but_not: Sequence[Span]) -> Silent:
    """The same devices by fewer words: exceptions that overlap are one, and none reaches beyond `before`."""
    kept: list[Span] = []
    for span in sorted(but_not, key=lambda one: one.end, reverse=True):
        if span.end >= before:
            before = min(before, span.start)
        elif kept and span.end >= kept[-1].start:
            kept[-1] = Span(min(span.start, kept[-1].start), kept[-1].end)
        else:
            kept.append(span)
    return Silent(before, tuple(kept))


def renewed(known: Taking | None, now: datetime) -> tuple[Taking, Span | None]:
    """What a ready daemon writes at `now`, and the blackout that its renewal ends, if it ends one."""
    if known is None or known.renewed_at - now > AHEAD_MOST:
        return Taking(now, now), None
    if now - known.renewed_at > GAP:
        return Taking(now, now), Span(known.renewed_at, now)
    return Taking(known.since, max(known.renewed_at, now)), None


def presence(now: datetime, taking: Taking | None, blackouts: Sequence[Span], interval: timedelta) -> Presence:
    """What is known at `now`; `blackouts` newest first. `interval`: between two heartbeats of a device. A blackout that
    ends ahead was written while the clock was wrong, and is none."""
    spans = [Span(one.start, min(one.end, now)) for one in blackouts if one.start < now and one.end - now <= AHEAD_MOST]
    lasting = taking is not None and now - taking.renewed_at > GAP
    if taking is not None and lasting:
        spans.insert(0, Span(taking.renewed_at, now))
    since = None if taking is None or lasting else taking.since
    return Presence(now, since, tuple(spans), AGENT_WAIT + interval)
