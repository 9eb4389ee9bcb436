"""The opening hours of a site, in OpenStreetMap's notation and an IANA time zone. Pure.

The library that reads the notation evaluates it in the site's local time. Its answers are collected once for each
window of 16 days, as spans in UTC, and every question is answered from these spans: an answer takes 1 to 3 µs instead
of 10 to 400 µs, and all answers agree with each other in the hour that a change of daylight saving time repeats. In
that hour, a boundary counts at its second occurrence; in the hour that is skipped, at the change.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from opening_hours import OpeningHours, ParserError, State  # type: ignore[attr-defined] # its stubs lack ParserError

from nexhb.devices.presence import Span
from nexhb.errors import BadInput
from nexhb.texts import quoted, unfit

MAX_CHARS = 500  # of the hours: at most 45 spans a day
MAX_RANGE = timedelta(days=400)

_WINDOW = timedelta(days=16)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)
_WINDOW_US = _WINDOW // _US
_MAX_RANGE_US = MAX_RANGE // _US
# The windows are computed with a day more on each side: a window that begins in a repeated hour would otherwise begin
# with the state of that hour's first occurrence.
_MARGIN = timedelta(days=1)
_UTC = ZoneInfo("UTC")  # the library accepts no other object for UTC
_ZONE = re.compile(r"[A-Za-z0-9_+/-]{1,64}", re.ASCII)
_PLACE = re.compile(r"--> 1:(\d+)")  # the place of an error in the library's message


@dataclass(frozen=True, slots=True)
class Hours:
    """Opening hours. All times are UTC."""

    text: str | None  # None: always open
    zone: str

    @classmethod
    def parse(cls, hours: str | None, zone: str) -> Hours:
        """Return the hours. Raise BadInput that names `hours` or `zone`."""
        _expression("24/7" if hours is None else hours, zone)
        return cls(hours, zone)

    @classmethod
    def stored(cls, hours: str | None, zone: str) -> Hours:
        """Return the hours of a site in the database. Hours that cannot be read (changed by hand, or stored by
        another version) count as always open, so that no outage is missed."""
        try:
            return cls.parse(hours, zone)
        except BadInput:
            return cls(None, "UTC")

    def is_open(self, at: datetime) -> bool:
        """Return whether the site is open. Hours that are marked as unknown count as closed."""
        if self.text is None:
            return True
        at_us = _us(at)
        window = _window(self.text, self.zone, at_us // _WINDOW_US)
        index = bisect_right(window.starts, at_us) - 1
        return index >= 0 and at_us < window.ends[index]

    def next_change(self, at: datetime) -> datetime | None:
        """Return when the site opens or closes next after `at`; None if it does not within MAX_RANGE."""
        if self.text is None:
            return None
        at_us, end_us = _us(at), _us(at) + _MAX_RANGE_US
        for span_start, span_end in self._spans(at_us, end_us):
            change = span_start if span_start > at_us else span_end
            return _at(change) if change < end_us else None
        return None

    def open_spans(self, start: datetime, end: datetime) -> list[Span]:
        """Return the times within `start` ≤ t < `end` in which the site is open. Raise BadInput if they are further
        apart than MAX_RANGE."""
        if end - start > MAX_RANGE:
            raise BadInput(f"Opening hours are computed for at most {MAX_RANGE.days} days.")
        if self.text is None:
            return [Span(start, end)] if start < end else []
        return [Span(_at(span_start), _at(span_end)) for span_start, span_end in self._spans(_us(start), _us(end))]

    def open_time(self, start: datetime, end: datetime) -> timedelta:
        """Return for how long the site is open within `start` ≤ t < `end`. Only the last MAX_RANGE before `end` are
        looked at, which is enough to say that a device has been silent for too long."""
        if start >= end:
            return timedelta(0)
        start = max(start, end - MAX_RANGE)
        if self.text is None:
            return end - start
        start_us, end_us = _us(start), _us(end)
        first, last = start_us // _WINDOW_US, end_us // _WINDOW_US
        open_us = _window(self.text, self.zone, last).open_until(end_us)
        for index in range(first, last):
            open_us += _window(self.text, self.zone, index).total
        return timedelta(microseconds=open_us - _window(self.text, self.zone, first).open_until(start_us))

    def _spans(self, start_us: int, end_us: int) -> Iterator[tuple[int, int]]:
        """Yield the open spans between two times, in order; none touches the next."""
        assert self.text is not None  # noqa: S101 - the callers return early
        pending: tuple[int, int] | None = None
        for index in range(start_us // _WINDOW_US, -(-end_us // _WINDOW_US)):
            window = _window(self.text, self.zone, index)
            for span_start, span_end in zip(window.starts, window.ends, strict=True):
                clipped = max(span_start, start_us), min(span_end, end_us)
                if clipped[0] >= clipped[1]:
                    continue
                if pending and pending[1] == clipped[0]:  # a span that goes on in the next window
                    clipped = pending[0], clipped[1]
                elif pending:
                    yield pending
                pending = clipped
        if pending:
            yield pending


class _Window(NamedTuple):
    """The open spans of a window, in microseconds since 1970."""

    starts: array[int]
    ends: array[int]
    open_before: array[int]  # the sum of the spans before each span
    total: int

    def open_until(self, until_us: int) -> int:
        """Return how long the site is open in this window before `until_us`."""
        index = bisect_right(self.starts, until_us) - 1
        if index < 0:
            return 0
        return self.open_before[index] + min(until_us, self.ends[index]) - self.starts[index]


# A window of usual hours takes 1 to 2 kB, one with the most spans 20 kB.
@lru_cache(maxsize=4096)
def _window(text: str, zone: str, index: int) -> _Window:
    start, end = _EPOCH + index * _WINDOW, _EPOCH + (index + 1) * _WINDOW
    starts, ends, open_before, total = array("q"), array("q"), array("q"), 0
    margins = (start - _MARGIN).astimezone(_UTC), (end + _MARGIN).astimezone(_UTC)
    for span_start, span_end, state, _ in _expression(text, zone).intervals(*margins):
        if state == State.OPEN:
            first, last = _us(max(span_start, start)), _us(min(span_end, end))
            if first < last:
                starts.append(first)
                ends.append(last)
                open_before.append(total)
                total += last - first
    return _Window(starts, ends, open_before, total)


@lru_cache(maxsize=4096)
def _expression(text: str, zone: str) -> OpeningHours:
    """Return the library's object. Raise BadInput that names `hours` or `zone`."""
    try:
        in_zone = ZoneInfo(zone) if _ZONE.fullmatch(zone) else None
        OpeningHours("24/7", timezone=in_zone)
    except (LookupError, OSError, TypeError, ValueError):  # TypeError: the library does not know the zone
        in_zone = None
    if in_zone is None:
        raise BadInput(
            f"zone {quoted(zone[:100])} is not a time zone of the IANA database.",
            hint="An example is Europe/Berlin.", field="zone",
        )  # fmt: skip
    if not text.strip() or len(text) > MAX_CHARS or unfit(text):
        raise BadInput(f"hours takes 1 to {MAX_CHARS} printable characters.", field="hours")
    try:
        return OpeningHours(text, timezone=in_zone, auto_country=False, auto_timezone=False)
    except ParserError as error:
        place = _PLACE.search(str(error))
        at = f" at character {place[1]}" if place else ""
        raise BadInput(
            f"hours {quoted(text)} cannot be read{at}.",
            hint='An example is "Mo-Fr 08:00-20:00; Sa 09:00-18:00".', field="hours",
        ) from None  # fmt: skip


def _us(moment: datetime) -> int:
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _at(moment_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=moment_us)
