"""Whether the daemon is ready, and if not, why: the only place that keeps the reasons.

A component that detects a condition calls `block`, and `clear` once the condition has passed. /readyz, the service
manager's status, the gauge nexhb_ready and the intake all read the result here.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from nexhb import metrics


class Source(enum.IntEnum):
    """What blocks readiness, in the order in which the reasons are listed."""

    SETTINGS = 1  # the database would lose what it commits
    DISK = 2  # the embedded PostgreSQL's disk runs full
    CLOCK = 3  # this host's clock and the database's are far apart
    STALL = 4  # the writer makes no progress
    LIFECYCLE = 5  # the daemon is starting or stopping
    DATABASE = 6  # nothing can be committed
    FAILURES = 7  # every batch fails with an unknown error


# A heartbeat that arrives while one of these blocks receives 503 at once. The others only make a load balancer send
# the fleet elsewhere; a heartbeat that still arrives may be committed.
REFUSING = (Source.DATABASE, Source.SETTINGS, Source.DISK)
# While one of these blocks, no heartbeat is committed: devices are not to blame for their silence.
PREVENTING = frozenset({*REFUSING, Source.FAILURES})


class _Block(NamedTuple):
    reason: str
    detail: str  # the reason for operators, as the database states it


class Readiness:
    """The reasons for which this daemon is not ready. Ready when created."""

    def __init__(self) -> None:
        self._blocks: dict[Source, _Block] = {}
        self.refusal = ""  # why no heartbeat is admitted; empty if heartbeats are admitted. Read for each heartbeat
        self._update()

    def block(self, source: Source, reason: str, detail: str = "") -> None:
        """Report not ready for `reason` until `clear(source)`. `detail` replaces the reason for operators."""
        self._blocks[source] = _Block(reason, detail or reason)
        self._update()

    def clear(self, source: Source) -> None:
        """Remove the reason of this source, if it has one."""
        if self._blocks.pop(source, None):
            self._update()

    def set(self, source: Source, reason: str) -> None:
        """Block for `reason`, or clear the source if the reason is empty."""
        if reason:
            self.block(source, reason)
        else:
            self.clear(source)

    def reason(self, source: Source) -> str:
        """Return the reason of this source; empty if it does not block."""
        block = self._blocks.get(source)
        return block.reason if block else ""

    def reasons(self, *, in_full: bool = False) -> list[str]:
        """Return every reason; with `in_full` as the database states it, which is for operators."""
        blocks = [self._blocks[source] for source in sorted(self._blocks)]
        return [block.detail if in_full else block.reason for block in blocks]

    @property
    def is_ready(self) -> bool:
        """Whether no source blocks readiness."""
        return not self._blocks

    @property
    def can_commit(self) -> bool:
        """Whether heartbeats can be committed now, as far as is known."""
        return PREVENTING.isdisjoint(self._blocks)

    def _update(self) -> None:
        self.refusal = next((self._blocks[source].reason for source in REFUSING if source in self._blocks), "")
        metrics.ready.set(self.is_ready)
