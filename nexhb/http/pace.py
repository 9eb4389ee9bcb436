"""When a device is asked to come again. Pure.

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
