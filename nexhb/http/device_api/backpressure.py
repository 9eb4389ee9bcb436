"""Backpressure: longer heartbeat intervals while the queue fills, and a limited rate of refusals. Pure.

A healthy daemon answers with the usual interval. As the queue fills, it asks devices to wait longer, each for a
different time: the fleet slows down and spreads out instead of returning all at once. The interval always stays below
the threshold after which a device counts as offline.
"""

from __future__ import annotations

CALM = 0.25  # fill ratio of the queue up to which the interval stays as it is
MAX_STRETCH = 4  # the longest interval, as a multiple of the usual interval


def interval_s(usual_s: int, offline_after_s: int, fill_ratio: float, fraction: float) -> int:
    """Return the seconds until a device's next heartbeat; `fraction` (0 to 1, random) spreads the devices."""
    if fill_ratio <= CALM:
        return usual_s
    slowest = max(usual_s, min(MAX_STRETCH * usual_s, offline_after_s // 2))
    depth = min((fill_ratio - CALM) / (0.9 - CALM), 1)
    return usual_s + round((slowest - usual_s) * depth * (0.5 + fraction / 2))


REFUSALS_PER_S = 1_000  # at 100 µs each, refusals take a tenth of the event loop's time
REFUSALS_AT_ONCE = 200
REFUSAL_WITHIN_S = 5.0  # the agent waits 30 s for a response


class RefusalPacer:
    """Spread refusals over time, so that no more than `per_s` are sent each second.

    A refusal costs as much as a heartbeat, and clients that retry at once would take the event loop from the writer:
    with 8,000 connections and a queue of 5,000, commits fell from 9,000 to 2,000 heartbeats per second. While a
    connection waits for its refusal, it sends nothing.
    """

    def __init__(self, *, per_s: float, at_once: int, within_s: float) -> None:
        self._interval_s = 1 / per_s
        self._at_once_s = at_once / per_s
        self._within_s = within_s
        self._reserved_until = 0.0

    def wait_s(self, now: float) -> float:
        """Reserve the next slot; return the seconds from `now` (monotonic) until that slot, at most `within_s`."""
        last = now + self._at_once_s + self._within_s
        self._reserved_until = min(max(self._reserved_until, now) + self._interval_s, last)
        return max(0.0, self._reserved_until - now - self._at_once_s)
