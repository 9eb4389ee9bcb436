"""The time of day in tests. A test's clock starts at the same time of day whenever the suite runs, far from midnight,
so that heartbeats of the last hours are of one UTC day and a result does not depend on the hour or on a fraction of a
second. The day is yesterday: to PostgreSQL, whose clock is the machine's, no heartbeat is in the future."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time

# A test that mixes this clock with the machine's is at least 11 hours wrong, and fails at every hour.
START = datetime.combine(datetime.now(UTC).date() - timedelta(days=1), clock_time(12, 0, 3, 456_789), UTC)


@dataclass
class Clock:
    """A clock that shows `start` when it is made, and then advances; a test may set it."""

    start: datetime = START
    fixed: datetime | None = None
    started_s: float = field(default_factory=time.monotonic)

    def __call__(self) -> datetime:
        return self.fixed or self.start + timedelta(seconds=time.monotonic() - self.started_s)
