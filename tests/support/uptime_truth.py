"""The rules of uptime, applied naively to each tenth of a minute of a day: an oracle for nexhb/watching/uptime.py."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from math import inf
from random import Random
from statistics import median_low
from typing import NamedTuple

from nexhb.watching.uptime import UNIT_S, UNITS_PER_DAY, Beat, Circumstances, DayParts, Heartbeats, Range, Stretch

MARGIN_S = 900
DAY = 86_400.0
HOUR = 3_600.0
START = 1_780_012_800.0  # 2026-05-29


class Sent(NamedTuple):
    """A heartbeat as it is stored."""

    at: float
    received: float
    uptime_s: int | None = None
    unity: bool | None = True
    battery: int | None = None


def usual(sent: Sequence[Sent], day: Circumstances, default_interval_s: float) -> tuple[float, float]:
    """Return the interval and the skew that are usual in a day's heartbeats, sorted by `at`."""
    if not sent:
        return default_interval_s, 0.0
    distances = [later.at - earlier.at for earlier, later in pairwise(sent)]
    interval_s = median_low(distances) if len(distances) >= 3 else default_interval_s
    delays = [one.received - one.at for one in sent]
    median, least, limit = median_low(delays), min(delays), day.offline_after_s
    if median - least <= limit and (least <= limit or sent[-1].at - sent[0].at > 2 * limit):
        return interval_s if interval_s <= 3600 else default_interval_s, median
    return interval_s if interval_s <= 3600 else default_interval_s, least if least <= limit else 0.0


def known(sent: Sequence[Sent], day: Circumstances, interval_s: float, skew_s: float = 0.0) -> Heartbeats:
    """Return what nexhb reads of a device's heartbeats, which may be of several days, to make this day."""
    begin, end = day.start - day.offline_after_s - MARGIN_S, day.start + 86_400
    read = [one for one in sent if begin <= one.at < end]
    before = [one.at for one in sent if one.at < begin]
    after = [Beat(one.at, one.received, one.uptime_s) for one in sent if one.at >= end]
    least = min((one.battery for one in read if one.battery is not None and one.at >= day.start), default=None)
    stretches = tuple(_stretches(read, day, interval_s, skew_s))
    previous_at = -inf if read and read[0].at < day.start else max(before, default=None)
    return Heartbeats(interval_s, skew_s, stretches, previous_at, min(after, default=None), least)


def _stretches(sent: Sequence[Sent], day: Circumstances, interval_s: float, skew_s: float) -> Iterator[Stretch]:
    number, numbered = 0, []
    for before, one in pairwise([None, *sent]):
        assert one is not None
        late = one.received - one.at > skew_s + day.offline_after_s
        if before is not None:
            distance = one.at - before.at
            restarted = one.uptime_s is not None and one.uptime_s < distance
            was_late = before.received - before.at > skew_s + day.offline_after_s
            overtook = one.received < before.received
            changed = one.unity is not before.unity or restarted or late != was_late or overtook
            number += distance > 1.5 * interval_s or changed
        numbered.append((number, late, one))
    for (_, late), group in groupby(numbered, key=lambda each: each[:2]):
        first, *_ = each = [one for *_, one in group]
        yield Stretch(first.at, each[-1].at, first.received, each[-1].received, late, first.uptime_s, first.unity)


def existed_from(sent: Sequence[Sent], day: Circumstances) -> float:
    """Return since when the device exists: an imported one since its first heartbeat that is read for the day."""
    begin, end = day.start - day.offline_after_s - MARGIN_S, day.start + 86_400
    return min([day.created, *(one.at for one in sent if begin <= one.at < end)])


def true_parts(sent: Sequence[Sent], day: Circumstances, interval_s: float, skew_s: float = 0.0) -> DayParts | None:
    """Return the parts of the day by looking at the middle of each tenth of a minute."""
    day = replace(
        day,
        now=day.now - skew_s,
        open=[Range(a - skew_s, b - skew_s) for a, b in day.open],
        blackouts=[Range(a - skew_s, b - skew_s) for a, b in day.blackouts],
        created=existed_from(sent, day) - skew_s,
        revoked=day.revoked - skew_s,
    )
    truth = _Truth(sent, day, interval_s, skew_s)
    moments = [day.start + (n + 0.5) * UNIT_S for n in range(UNITS_PER_DAY)]
    kinds = [truth.kind(t) for t in moments if day.created <= t < min(day.revoked, day.now)]
    if not kinds:
        return None
    counts = {kind: sum(each == kind for each, _ in kinds) for kind in ("closed", "ours", "heard", "replayed", "off")}
    unknown = len(kinds) - sum(counts.values())
    in_day = [one for one in sent if day.start <= one.at < day.start + 86_400]
    battery = min((one.battery for one in in_day if one.battery is not None), default=None)
    unity = sum(running for _, running in kinds)
    return DayParts(**counts, unknown=unknown, unity=unity, battery_least=battery, flaps=-1, reboots=-1, is_open=False)


class _Truth:
    def __init__(self, sent: Sequence[Sent], day: Circumstances, interval_s: float, skew_s: float) -> None:
        self.sent, self.day, self.longest, self.skew_s = sent, day, 1.5 * interval_s, skew_s
        self.begin = day.start - day.offline_after_s - MARGIN_S  # earlier heartbeats are not read
        self.times = [one.at for one in sent]
        self.is_late = [one.received - one.at > skew_s + day.offline_after_s for one in sent]

    def kind(self, t: float) -> tuple[str, bool]:
        """Return what the tenth of a minute around `t` is, and whether Unity was running in it."""
        if not any(a <= t < b for a, b in self.day.open):
            return "closed", False
        if any(a <= t < b for a, b in self.day.blackouts):
            return "ours", False
        number = bisect_right(self.times, t)
        if number == 0:
            return "unknown", False
        before, after = self.sent[number - 1], self.sent[number] if number < len(self.sent) else None
        if self.is_regular(before.at, self.day.now if after is None else after.at):
            return ("replayed" if self.is_replayed(t, number) else "heard"), bool(before.unity)
        return self.silence(t, number, before, after), False

    def silence(self, t: float, number: int, before: Sent, after: Sent | None) -> str:
        """Return what a moment between two heartbeats that are too far apart is."""
        if after is None or after.uptime_s is None:
            return "unknown"
        boot = after.at - after.uptime_s
        if t < boot:
            return "off" if boot > before.at else "replayed"
        is_near = boot > before.at and after.at - boot <= self.longest
        return "heard" if is_near and not self.is_replayed(t, number) else "replayed"

    def is_regular(self, start: float, end: float) -> bool:
        return end - start - sum(max(min(end, b) - max(start, a), 0) for a, b in self.day.blackouts) <= self.longest

    def is_replayed(self, t: float, number: int) -> bool:
        """Return whether the line was down: the next heartbeat is late, or the last replay had not begun to arrive."""
        if number < len(self.sent) and self.is_late[number]:
            return True
        last = number - 1
        while last >= 0 and not self.is_late[last]:
            if self.times[last] < t - 2 * self.day.offline_after_s:
                return False
            last -= 1
        first = last
        while first > 0 and self.is_late[first - 1] and self.times[first - 1] >= self.begin:
            first -= 1
        arrivals = [one.received - self.skew_s for one in self.sent[first : last + 300]]
        return last >= 0 and t < min(arrival for arrival in arrivals if arrival > self.times[last])


def history(random: Random, start: float = START) -> list[Sent]:
    """Return up to three days of a device that is switched off, loses its line with or without its queue, restarts, and
    whose Unity crashes."""
    sent: list[Sent] = []
    event, at, boot = "live", start - random.randrange(20_000) * UNIT_S, start - 10 * DAY
    end = start + random.uniform(-5, 30) * HOUR
    while at < end:
        # After a replay the line holds until the queue is sent.
        events = ["live", "down", "lost", "off", "reboot", "crash", "no uptime"]
        event = "live" if event == "down" else random.choice(events)
        stop = at + random.choice([100, 1_000, 4_000]) * random.randrange(1, 10) // 10 * UNIT_S
        times = [at + n * 60 for n in range(int((stop - at) // 60))]
        at = stop + UNIT_S
        if event == "reboot":
            boot = at if not times else times[0]
        if event == "off":
            boot = stop - 5 * UNIT_S
        elif event != "lost":
            back = stop + random.randrange(10) * UNIT_S if event == "down" else None
            sent += [
                Sent(
                    moment,
                    moment + UNIT_S if back is None else back + number * UNIT_S,
                    None if event == "no uptime" else int(max(moment - boot, 0)),
                    event != "crash",
                    random.randrange(100),
                )
                for number, moment in enumerate(times)
            ]
    return sent
