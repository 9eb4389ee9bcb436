"""When a device is asked to come again, and when it hears that. Pure.

A healthy daemon answers with the usual interval. As the queue fills, devices are asked to wait longer and at different
lengths: the fleet slows down, and spreads instead of coming back as one. Below the offline threshold all the while.
"""

from __future__ import annotations

CALM = 0.25  # of the queue's bound: up to there nothing changes
MOST_TIMES = 4


def interval_s(usual_s: int, offline_after_s: int, filled: float, fraction: float) -> int:
    """Seconds to wait, for a queue filled to `filled` (0 to 1); `fraction` (0 to 1, random) spreads devices."""
    if filled <= CALM:
        return usual_s
    slowest = max(usual_s, min(MOST_TIMES * usual_s, offline_after_s // 2))
    depth = min((filled - CALM) / (0.9 - CALM), 1)
    return usual_s + round((slowest - usual_s) * depth * (0.5 + fraction / 2))


REFUSALS_PER_S = 1_000  # 100 µs each: a tenth of the event loop's time
REFUSALS_AT_ONCE = 200
REFUSAL_WITHIN_S = 5.0  # the agent waits 30 s for an answer


class Turns:
    """So many refusals a second, each at its time.

    One costs what a heartbeat costs, and whoever comes again at once would take the event loop from the writer: 8,000
    connections against a queue of 5,000 left 2,000 commits of 9,000/s. A connection that waits sends nothing meanwhile.
    """

    def __init__(self, *, per_s: float, at_once: int, within_s: float) -> None:
        self._interval_s = 1 / per_s
        self._at_once_s = at_once / per_s
        self._within_s = within_s
        self._taken_up_to = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds from `now` (any clock that does not step) until the next turn, `within_s` at most."""
        last = now + self._at_once_s + self._within_s
        self._taken_up_to = min(max(self._taken_up_to, now) + self._interval_s, last)
        return max(0.0, self._taken_up_to - now - self._at_once_s)
