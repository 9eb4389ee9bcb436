"""Requests for a closed loop: distinct keys as a live fleet would make them, spliced from parts made beforehand."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from bench.fleet import BUCKET_US, MICROS, Device, body_us, second_text
from bench.load.target import Target

# more than any server here answers per second on two cores; the pool is as long as a run at this rate
RATE_BOUND: Final = 45_000
_DAY_US: Final = 86_400 * MICROS
# one day less than what the server takes by default: older timestamps count as those of a wrong clock
_OLDEST_BUCKETS: Final = 6 * _DAY_US // BUCKET_US


class Span(NamedTuple):
    """Consecutive buckets: the first one's start (µs since 1970), and how many."""

    first_us: int
    buckets: int

    @property
    def end_us(self) -> int:
        """The first instant behind it."""
        return self.first_us + self.buckets * BUCKET_US

    def parts(self, number: int) -> tuple[Span, ...]:
        """Equal parts, oldest first: runs that follow each other, each newer than the last."""
        each = self.buckets // number
        return tuple(Span(self.first_us + part * each * BUCKET_US, each) for part in range(number))


def recent_span(requests: int, devices: int, now_us: int, *, ends_before_us: int | None = None) -> Span:
    """The newest buckets that hold so many requests, one per device and bucket; a device's only ever gets newer.

    All lie in one UTC day wherever they can, as a live fleet's do: a span that would begin yesterday ends with it.
    """
    end_us = min(now_us, ends_before_us or now_us)
    end_us -= end_us % BUCKET_US
    buckets = max(1, min(math.ceil(requests / devices), _OLDEST_BUCKETS))
    midnight_us = end_us - end_us % _DAY_US
    if end_us - buckets * BUCKET_US < midnight_us and buckets * BUCKET_US <= _DAY_US:
        end_us = midnight_us
    return Span(end_us - buckets * BUCKET_US, buckets)


class Keys:
    """Buckets of one database, handed out stretch after stretch, each newer than the last."""

    def __init__(self, span: Span, devices: int) -> None:
        self._rest = span
        self._devices = devices

    def take(self, requests: int) -> Span:
        """The next stretch that holds so many requests, one per device and bucket."""
        return self.buckets(math.ceil(requests / self._devices))

    def buckets(self, number: int) -> Span:
        """The next so many buckets."""
        if number > self._rest.buckets:
            raise ValueError(f"{number} buckets are wanted, and {self._rest.buckets} are left")
        taken = Span(self._rest.first_us, number)
        self._rest = Span(taken.end_us, self._rest.buckets - number)
        return taken


class Requests(Protocol):
    """What a load sends, by number."""

    def __len__(self) -> int:
        """How many there are."""

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Request `number`: its device, its timestamp (µs since 1970) and its bytes."""


class RequestPool:
    """Requests of distinct (device, bucket), oldest bucket first.

    A whole body costs 1.5 µs and a million of them a gigabyte; two joins around the timestamp cost 0.2 µs.
    The same devices in the same span give the same keys: a second run on the same data wants another span.
    """

    _VARIANTS: Final = 4

    def __init__(self, to: Target, fleet: Sequence[Device], span: Span) -> None:
        """Make the parts."""
        first_us = span.first_us
        self._first_s = first_us // MICROS
        self._devices = len(fleet)
        self._steps = span.buckets
        self._fraction_us = array("q")
        self._before: list[bytes] = []
        self._after: list[bytes] = []
        for device in fleet:
            made_us = device.made_us(first_us + 1_001 * (1 + device.index % 900))
            self._fraction_us.append(made_us % MICROS)
            for variant in range(self._VARIANTS):
                body = body_us(device, made_us, variant)
                at = body.index(second_text(self._first_s))
                self._before.append(b"%b%d\r\n\r\n%b" % (to.head(device), len(body), body[:at]))
                self._after.append(body[at + len(second_text(self._first_s)) :])

    def __len__(self) -> int:
        """How many requests there are."""
        return self._devices * self._steps

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Request `number`: its device, its timestamp (µs since 1970) and its bytes."""
        step, device = divmod(number, self._devices)
        # a device sends at its own second of the bucket
        second = self._first_s + step * 10 + device % 10
        part = device * self._VARIANTS + step % self._VARIANTS
        ts_us = second * MICROS + self._fraction_us[device]
        return device, ts_us, b"".join((self._before[part], second_text(second), self._after[part]))
