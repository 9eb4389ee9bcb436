"""Bodies of POST /v1/heartbeats for a closed loop: each the queue of one device, made before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple

from bench.fleet import BUCKET_US, MICROS, Device, body_us
from bench.load.pool import Span
from bench.load.target import Target
from bench.report import SendLog

Form = Literal["array", "ndjson"]
# what an agent keeps
QUEUE: Final = 500
_MEDIA: Final = {"array": "application/json", "ndjson": "application/x-ndjson"}


class Queue(NamedTuple):
    """One device's heartbeats, oldest first: its number in the fleet, and when each was made (µs since 1970)."""

    device: int
    made_us: tuple[int, ...]


def queue(number: int, fleet: Sequence[Device], span: Span, size: int = QUEUE) -> Queue:
    """Queue `number` of a span: every device's first, then every device's second, a heartbeat a bucket."""
    at, index = divmod(number, len(fleet))
    if (at + 1) * size > span.buckets:
        raise ValueError(f"queue {number} lies behind the {span.buckets} buckets there are")
    device = fleet[index]
    # at its own second of the bucket, with a fraction of its own
    first_us = span.first_us + at * size * BUCKET_US + device.index % 10 * MICROS + 1_001 * (1 + device.index % 900)
    return Queue(index, tuple(device.made_us(first_us + n * BUCKET_US) for n in range(size)))


def body_of(found: Queue, fleet: Sequence[Device], form: Form) -> bytes:
    """The body that carries a queue."""
    device = fleet[found.device]
    items = [body_us(device, made_us, n) for n, made_us in enumerate(found.made_us)]
    return b"[%b]" % b",".join(items) if form == "array" else b"\n".join(items) + b"\n"


class Batches:
    """Requests that carry these queues; each is 0.6 MB and takes a millisecond to make."""

    def __init__(self, to: Target, fleet: Sequence[Device], queues: Sequence[Queue], form: Form) -> None:
        """Make them all."""
        self.to = replace(to, path=f"{to.path}s", media=_MEDIA[form])
        self._queues = queues
        self._requests = [self._request(fleet, each, form) for each in queues]

    def _request(self, fleet: Sequence[Device], each: Queue, form: Form) -> bytes:
        body = body_of(each, fleet, form)
        return b"%b%d\r\n\r\n%b" % (self.to.head(fleet[each.device]), len(body), body)

    def __len__(self) -> int:
        """How many requests there are."""
        return len(self._requests)

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Request `number`: its device, its first timestamp (µs since 1970) and its bytes."""
        device, made_us = self._queues[number]
        return device, made_us[0], self._requests[number]

    def heartbeats(self, sends: SendLog) -> SendLog:
        """The record of a run, a heartbeat a line: each shares what became of its request."""
        out = SendLog()
        for number, outcome in enumerate(sends.outcome):
            device, made_us = self._queues[number]
            for ts_us in made_us:
                out.outcome[out.add(device, ts_us)] = outcome
        return out
