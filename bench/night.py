"""A nightly run of the daemon under test: triggered as an operator would, and what its log says of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from bench.stack import Stack, StackError

_MOST_S: Final = 1800.0
# what a nightly run logs of a day, and how a person says it
_STEPS: Final = {
    "archive.start": "begun",
    "partition.detach": "detached",
    "archive.end": "verified",
    "archive.failed": "failed",
    "partition.drop": "dropped",
    "archive.drill": "drilled",
}


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time, in seconds since 1970."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Night:
    """One run: what POST /ops/nightly answered, when, and what was logged meanwhile."""

    status: int
    answer: Mapping[str, Any]
    asked: Window
    events: Sequence[Mapping[str, Any]]

    @property
    def completed(self) -> bool:
        """Whether everything went well."""
        return self.status == 200 and self.answer.get("status") == "completed"

    def archive(self, partition: str) -> Window:
        """From the first step on the day to the last byte read back. Raises StackError where it did not come to it."""
        found = {e["event"]: at_s(e) for e in self.events if e.get("partition") == partition}
        try:
            return Window(found["archive.start"], found["archive.end"])
        except KeyError:
            raise StackError(f"{partition} was not archived: {self.answer}") from None

    def timeline(self) -> str:
        """When what was done, in seconds from the request."""
        steps = [(at_s(e) - self.asked.start_s, _STEPS[e["event"]]) for e in self.events if e.get("event") in _STEPS]
        return ", ".join(f"{name} {seconds:.1f} s" for seconds, name in [*steps, (self.asked.seconds, "answered")])


def at_s(event: Mapping[str, Any]) -> float:
    """When a line was logged, in seconds since 1970."""
    return datetime.fromisoformat(event["ts"]).timestamp()


async def nightly(own: Stack) -> Night:
    """Run it now, and wait for its end."""
    began_s, seen = time.time(), len(own.events())
    status, answer = await asyncio.to_thread(own.post, "/ops/nightly", timeout_s=_MOST_S)
    return Night(status, answer, Window(began_s, time.time()), own.events()[seen:])
