"""What a kiosk's agent sends: heartbeats by a fixed alarm, and its queue once it can send again. Pure."""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from bench.sim.script import AGENT, CLOCK, CLONE, FLAT, HOUR, LINE, MINUTE, POWER, UNITY, Kiosk, Script

QUEUE = 500
CHUNK = 25  # heartbeats of a queue that are posted at once
BACK_OFF_S = 375.0  # the longest pause after a 503: 300 s and a quarter
UNPLUGGED, CHARGES = 2 * HOUR, 96 * MINUTE  # before and after the battery is flat
NEVER = float("inf")


class Sent(NamedTuple):
    """A heartbeat that nexhb received at `at`."""

    at: float
    number: int  # of the kiosk
    made: float  # ts
    boot: float
    battery_pct: int
    plugged: bool
    unity: bool
    clock_wrong: bool
    version: str
    queued: bool
    cloned: bool = False  # by another kiosk with the same token


def sent_by(kiosk: Kiosk, script: Script) -> Iterator[Sent]:
    """Yield what nexhb receives from a kiosk, in this order."""
    rng = random.Random(f"agent {script.seed} {kiosk.number}")
    phase = rng.uniform(0, kiosk.interval)
    pending: list[Sent] = []  # a heap: on its way
    queue: deque[Sent] = deque(maxlen=QUEUE)
    sends_at = 0.0  # when the queue is sent; NEVER: after the next live heartbeat
    blocked = False  # waiting after a 503
    random_number, new, interval, latency = rng.random, tuple.__new__, kiosk.interval, kiosk.latency
    calm_until, content = 0.0, _made(kiosk, 0.0)[3:]
    edges = _edges(kiosk, script)
    for count in itertools.count(1):
        made = phase + (count - 0.1 + 0.2 * random_number()) * interval
        if made < calm_until:
            yield new(Sent, (made + latency, kiosk.number, made, *content))
            continue
        if queue and sends_at <= made:
            _post(queue, sends_at, pending)
            blocked = False
        while pending and pending[0].at <= made:
            yield heapq.heappop(pending)
        if made >= script.end:
            return
        if kiosk.truth(made, POWER, FLAT, AGENT):
            continue
        heartbeat = _made(kiosk, made)
        if not queue and not pending and not blocked and _is_calm(kiosk, script, made):
            calm_until, content = edges[bisect_right(edges, made)], heartbeat[3:]
            yield heartbeat
            continue
        ours = next((up for down, up in script.ours if down <= made + kiosk.latency < up), None)
        line = kiosk.truth(made, LINE)
        if line is not None:
            queue.append(heartbeat._replace(queued=True))
            sends_at = line.end + rng.uniform(1, 30) if kiosk.sends_queue_first else NEVER
        elif ours is not None or blocked or (queue and kiosk.sends_queue_first):
            queue.append(heartbeat._replace(queued=True))
            if not blocked and ours is not None:
                blocked, sends_at = True, ours + rng.uniform(0, BACK_OFF_S)
        else:
            _send(kiosk, heartbeat, pending)
            if queue and sends_at == NEVER:
                sends_at = made + rng.uniform(2, 5)


def _send(kiosk: Kiosk, heartbeat: Sent, pending: list[Sent]) -> None:
    """Put a heartbeat on its way, and the next one of a kiosk with the same token."""
    heapq.heappush(pending, heartbeat)
    if kiosk.truth(heartbeat.made, CLONE):
        later = kiosk.interval / 2
        cloned = heartbeat._replace(at=heartbeat.at + later, made=heartbeat.made + later, cloned=True)
        heapq.heappush(pending, cloned)


def _edges(kiosk: Kiosk, script: Script) -> list[float]:
    """Return the times between which the content of heartbeats, and how they are sent, do not change."""
    edges = {kiosk.updated_at, script.end}
    for each in kiosk.truths:
        edges |= {each.start, each.end, each.start - UNPLUGGED, each.end + CHARGES}
    for down, up in script.ours:
        edges |= {down - kiosk.latency, up}
    return [*sorted(edges), script.end]


def _is_calm(kiosk: Kiosk, script: Script, made: float) -> bool:
    """Return whether nothing happens to the kiosk, and heartbeats are accepted."""
    happens = any(each.start - UNPLUGGED <= made < each.end + CHARGES for each in kiosk.truths)
    return not happens and not any(down <= made + kiosk.latency < up for down, up in script.ours)


def _post(queue: deque[Sent], at: float, pending: list[Sent]) -> None:
    """Put the queue on its way, oldest first."""
    for number in itertools.count():
        for _ in range(min(CHUNK, len(queue))):
            heapq.heappush(pending, queue.popleft()._replace(at=at + number * 0.5))
        if not queue:
            return


def _made(kiosk: Kiosk, made: float) -> Sent:
    """Return a heartbeat made at `made`, which is received at once."""
    if not kiosk.truths:
        version = "1.1.0" if made >= kiosk.updated_at else "1.0.9"
        return Sent(made + kiosk.latency, kiosk.number, made, -100_000.0, 100, True, True, False, version, False)
    offs = [each.end for each in kiosk.truths if each.kind in (POWER, FLAT) and each.end <= made]
    pct, plugged = _battery(kiosk, made)
    clock_wrong = kiosk.truth(made, CLOCK) is not None
    at = made + kiosk.latency
    return Sent(
        at, kiosk.number, at if clock_wrong else made, max(offs, default=-100_000.0), pct, plugged,
        kiosk.truth(made, UNITY) is None, clock_wrong, "1.1.0" if made >= kiosk.updated_at else "1.0.9", False,
    )  # fmt: skip


def _battery(kiosk: Kiosk, made: float) -> tuple[int, bool]:
    """Return the charge and whether the kiosk is plugged in: it is unplugged for two hours before it runs flat."""
    for each in kiosk.truths:
        if each.kind == FLAT and each.start - UNPLUGGED <= made < each.start:
            return 3 + int((each.start - made) / MINUTE / 6), False
        if each.kind == FLAT and each.end <= made < each.end + CHARGES:
            return 5 + int((made - each.end) / MINUTE), True
    return 100, True
