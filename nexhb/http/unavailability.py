"""The 503 responses of both APIs, each with a Retry-After."""

from __future__ import annotations

import time
from collections.abc import Callable

from nexhb import log
from nexhb.errors import described
from nexhb.http.transport.problem import Problem
from nexhb.postgres.errors import reason
from nexhb.rate_limit import RateLimiter

_log = log.get("http")


class Unavailability:
    """Creates the 503 Problems. `retry_after_s` is random, which spreads the clients' retries."""

    def __init__(self, retry_after_s: Callable[[], int]) -> None:
        self._retry_after_s = retry_after_s
        self._logged = RateLimiter(burst=5, per_second=0.2)  # log lines while the database is away

    def retry_later(self, detail: str, *, close: bool = False) -> Problem:
        """Return a 503 with this detail."""
        return Problem(503, detail, headers={"Retry-After": str(self._retry_after_s())}, close=close)

    def because_of(self, error: Exception) -> Problem:
        """Return a 503 for a client that may not have a key: PostgreSQL's message is written only to the log."""
        if self._logged.acquire("", time.monotonic()).allowed:
            _log.warning("http.unavailable", error=described(error))
        if isinstance(error, MemoryError):
            return self.retry_later("There is not enough memory.")
        return self.retry_later(f"The database is not available: {reason(error)}.")
