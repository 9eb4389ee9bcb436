"""Rate limits by key. Pure: the clock is an argument.

The algorithm is the generic cell rate algorithm, which keeps one number for each key: the time from which on the key
has its whole burst again. A key whose time has passed needs no entry.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

MAX_KEYS = 100_000  # number of keys that are remembered before idle keys are dropped


class Permit(NamedTuple):
    """The answer of a rate limiter."""

    allowed: bool
    retry_after_s: float  # 0 if allowed


_ALLOWED = Permit(allowed=True, retry_after_s=0.0)


class RateLimiter:
    """Allow each key `burst` uses at once, and `per_second` on average."""

    def __init__(self, *, burst: float, per_second: float) -> None:
        self._interval = 1 / per_second
        self._tolerance = burst * self._interval
        self._used_up_to: dict[Hashable, float] = {}

    def acquire(self, key: Hashable, now: float, amount: float = 1) -> Permit:
        """Use `amount` of the key's allowance at `now` (s, any monotonic clock); a refused call uses nothing."""
        used = max(self._used_up_to.get(key, 0.0), now) + amount * self._interval
        over = used - now - self._tolerance
        if over > 1e-9:
            return Permit(allowed=False, retry_after_s=over)
        if len(self._used_up_to) >= MAX_KEYS and key not in self._used_up_to:
            self._forget_idle(now)
        self._used_up_to[key] = used
        return _ALLOWED

    def give_back(self, key: Hashable, amount: float = 1) -> None:
        """Return the permits that were acquired but not used."""
        if key in self._used_up_to:
            self._used_up_to[key] -= amount * self._interval

    def retry_after_s(self, key: Hashable, now: float, amount: float = 1) -> float:
        """Return the seconds until `amount` would be allowed, 0 if it is allowed at `now`; this consumes no permits."""
        over = max(self._used_up_to.get(key, 0.0), now) + amount * self._interval - now - self._tolerance
        return over if over > 1e-9 else 0.0

    def is_exhausted(self, key: Hashable, now: float) -> bool:
        """Return whether not even one use would be allowed at `now`."""
        return self.retry_after_s(key, now) > 0

    def clear(self) -> None:
        """Drop every key."""
        self._used_up_to.clear()

    def _forget_idle(self, now: float) -> None:
        """Drop the keys that have their whole burst again; if there are none, drop every key, to bound the memory."""
        self._used_up_to = {key: used for key, used in self._used_up_to.items() if used > now}
        if len(self._used_up_to) >= MAX_KEYS:
            self._used_up_to.clear()
