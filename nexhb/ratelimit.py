"""Who comes too often. Pure: the clock is an argument.

A generic cell rate algorithm: one number a key, the time at which its allowance would be used up no more. A key that
has not come for a while is as good as forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable

HELD = 100_000  # keys remembered before those with nothing to remember are dropped


class Allowance:
    """`burst` at once, `per_second` in the long run, for each key."""

    def __init__(self, *, burst: float, per_second: float) -> None:
        self._interval = 1 / per_second
        self._tolerance = burst * self._interval
        self._used_up_to: dict[Hashable, float] = {}

    def take(self, key: Hashable, now: float, amount: float = 1) -> float:
        """Take `amount` at `now` (s, any clock that does not step). 0 where it is allowed, else the seconds after which
        it will be; what is refused takes nothing."""
        used = max(self._used_up_to.get(key, 0.0), now) + amount * self._interval
        over = used - now - self._tolerance
        if over > 1e-9:
            return over
        if len(self._used_up_to) >= HELD and key not in self._used_up_to:
            self._forget(now)
        self._used_up_to[key] = used
        return 0.0

    def give_back(self, key: Hashable, amount: float = 1) -> None:
        """What was taken was not used."""
        if key in self._used_up_to:
            self._used_up_to[key] -= amount * self._interval

    def is_spent(self, key: Hashable, now: float) -> bool:
        """True where not even one would be allowed now."""
        return max(self._used_up_to.get(key, 0.0), now) + self._interval - now - self._tolerance > 1e-9

    def clear(self) -> None:
        """Forget every key."""
        self._used_up_to.clear()

    def _forget(self, now: float) -> None:
        """Drop who owes nothing; where all do, everybody: a limit must not grow without one itself."""
        self._used_up_to = {key: used for key, used in self._used_up_to.items() if used > now}
        if len(self._used_up_to) >= HELD:
            self._used_up_to.clear()
