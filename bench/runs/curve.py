"""The fleet's curve: fleets of several sizes, each at its rate on a fresh daemon and database, and the maximal rate."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final, NamedTuple

import uvloop

from bench import stack
from bench.finding import LOAD_HEAD, Finding, figure, load_cells, markdown, worst
from bench.fleet import Account, make_accounts
from bench.load import RATE_BOUND, Keys, Spliced, due_times, stream, target
from bench.report import FLOORS, NOTHING_DEDUPLICATED, Result, Verdict, at_least, at_most
from bench.runs import Plan, Say
from bench.trial import SEED, UNLIMITED, Trial, combined, examine

# the bytes per row have a limit only in a run with at least this many rows: with fewer, batches do not fill their pages
_MIN_ROWS: Final = 50_000
_HISTORY: Final = """
SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint FROM pg_inherits
WHERE inhparent = 'device_heartbeats'::regclass
"""
_BATCH: Final = ("nexhb_batch_heartbeats_sum", "nexhb_batch_heartbeats_count")
_ADD_DEVICES: Final = "INSERT INTO devices (device_id) SELECT unnest($1::text[])"
_ADD_TOKENS: Final = """
INSERT INTO device_tokens (token_sha256, device_no)
SELECT t.token_sha256, d.device_no FROM unnest($1::text[], $2::bytea[]) AS t (device_id, token_sha256)
JOIN devices d USING (device_id)
"""
_INTRO: Final = (
    "## The fleet's curve\n\n"
    "One daemon serves fleets of different sizes. Each line is a run with a fresh daemon and database, which know "
    "every device of the fleet; each device has sent once before the measured window begins. In the window, "
    "heartbeats arrive at the rate of the fleet at 60 s, each from another device, in random order. In the last line "
    "they are sent as fast as the daemon responds (a closed loop)."
)


async def add_accounts(own: stack.Stack, accounts: Sequence[Account]) -> None:
    """Insert devices and tokens by two statements, since an import of half a million by CSV takes a minute."""
    ids = [account.device_id for account in accounts]
    async with own.connected() as conn:
        await conn.execute(_ADD_DEVICES, ids)
        await conn.execute(_ADD_TOKENS, ids, [hashlib.sha256(account.token.encode()).digest() for account in accounts])
        await conn.execute("VACUUM (ANALYZE) devices, device_tokens")


class Point(NamedTuple):
    """A fleet, its rate (None: as fast as possible), the load, and what the daemon and the database needed for it."""

    devices: int
    due_per_s: float | None
    result: Result
    # the daemon's memory with every token loaded, and after the load
    known_mb: float
    end_mb: float
    rows: int
    row_bytes: float
    # heartbeats per transaction
    batch_mean: float

    @property
    def name(self) -> str:
        """Return fleet and rate in words."""
        rate = "as fast as possible" if self.due_per_s is None else f"{self.due_per_s:,.0f}/s"
        return f"{self.devices:,} devices, {rate}"


@dataclass(frozen=True)
class Curve(Plan):
    """Fleets of four sizes, each at its rate and with every token in the daemon's memory, and a run as fast as
    possible."""

    QUICK: ClassVar = {"window_s": 5.0, "fleets": (2_000, 20_000, 200_000)}

    name: str = "curve"
    title: str = "fleets of 2,000 to 500,000 devices at 60 s, and the ceiling: latency, CPU, memory, bytes"
    fleets: tuple[int, ...] = (2_000, 20_000, 200_000, 500_000)
    interval_s: float = 60
    window_s: float = 30.0
    connections: int = 1_000
    # number of connections of the run as fast as possible, and of the closed loop in which every device sends once
    # before a measurement
    closed_connections: int = 256

    def run(self, say: Say) -> Finding:
        """Measure every point, from the smallest fleet to the maximal rate; return the finding."""
        points, trials = self.measure(say)
        verdicts = (*verdicts_of(points[:-1]), *worst(each for trial in trials for each in trial.result.verdicts))
        details = {point.name: point._asdict() for point in points}
        cores = tuple(point.result.others_cores or 0.0 for point in points)
        return Finding(self.name, self.title, verdicts, {}, details, cores, page_of(points))

    def measure(self, say: Say) -> tuple[list[Point], list[Trial]]:
        """Measure every point; return the points, the maximal rate last, and their comparisons with the database."""
        both = []
        for number, devices in enumerate((*self.fleets, self.fleets[0])):
            rate = devices / self.interval_s if number < len(self.fleets) else None
            accounts = make_accounts(devices, SEED)
            with stack.running(settings=UNLIMITED) as own:
                uvloop.run(add_accounts(own, accounts))
                # the restarted daemon loads every token; a second later its memory is stable
                own.stop()
                own.start()
                time.sleep(1)
                both.append(uvloop.run(self._point(own, accounts, rate)))
            say(both[-1][0].name)
        return [point for point, _ in both], [trial for _, trial in both]

    async def _point(self, own: stack.Stack, accounts: Sequence[Account], rate: float | None) -> tuple[Point, Trial]:
        """Send at a rate, or as fast as possible, and compare every row."""
        to, known_mb, connections = target(own.url), own.memory().rss_mb, self.closed_connections
        due_us = due_times((rate or RATE_BOUND, self.window_s))
        # every device must have sent before, as the devices of a real fleet have
        keys = Keys(len(due_us) + 2 * len(accounts), len(accounts))
        async with own.connected() as conn:
            empty_bytes = await conn.fetchval(_HISTORY)
        pids, one_each = (own.pid,), Spliced(to, accounts, keys.buckets(1))
        first = await stream(to, one_each, connections=connections, duration_s=600)
        before = await asyncio.to_thread(own.metrics)
        requests, due = Spliced(to, accounts, keys.holding(len(due_us))), due_us if rate else None
        connections = min(self.connections, len(accounts)) if rate else connections
        run = await stream(to, requests, due, duration_s=self.window_s, connections=connections, pids=pids)
        trial = await examine(own, accounts, combined([first, run]), NOTHING_DEDUPLICATED)
        metrics, rows = await asyncio.to_thread(own.metrics), trial.check.lines[0].found
        async with own.connected() as conn:
            row_bytes = round((await conn.fetchval(_HISTORY) - empty_bytes) / max(1, rows), 1)
        written, batches = (metrics[name] - before[name] for name in _BATCH)
        end_mb, batch_mean = own.memory().rss_mb, round(written / max(1, batches), 2)
        return Point(len(accounts), rate, run.result, known_mb, end_mb, rows, row_bytes, batch_mean), trial


def known_bytes(paces: Sequence[Point]) -> int:
    """Return by how many bytes per device the daemon's memory grows from the smallest fleet to the largest."""
    small, large = paces[0], paces[-1]
    return round((large.known_mb - small.known_mb) * 1e6 / max(1, large.devices - small.devices))


def verdicts_of(paces: Sequence[Point]) -> list[Verdict]:
    """Return every limit of the curve, kept or broken."""
    verdicts: list[Verdict] = []
    for point in paces:
        name, result = f"{point.devices:,} devices", point.result
        share = result.rate_per_s / (point.due_per_s or result.rate_per_s)
        verdicts.append(at_least(f"{name}: share of the rate that was sent", 0.95, round(share, 3)))
        verdicts += [at_most(f"{name}: {each.name}", each.limit, getattr(result, each.field)) for each in FLOORS]
    for before, after in pairwise(paces):
        # CPU per heartbeat should not grow, since more heartbeats share a transaction as the rate rises; two equal runs
        # differ by up to a tenth
        name = f"CPU of a heartbeat at {after.devices:,} devices, divided by that at {before.devices:,}"
        was, now = ((each.daemon_us or 0.0) + (each.postgres_us or 0.0) for each in (before.result, after.result))
        verdicts.append(at_most(name, 1.1, round(now / max(0.1, was), 3)))
    verdicts.append(at_most("memory of the daemon for a known device, bytes", 1_000, known_bytes(paces)))
    if (largest := paces[-1]).rows >= _MIN_ROWS:
        name = f"{largest.devices:,} devices: bytes of the history for a heartbeat"
        verdicts.append(at_most(name, 130, largest.row_bytes))
    return verdicts


def page_of(points: Sequence[Point]) -> tuple[str, ...]:
    """Return the section of docs/performance.md."""
    rows = [
        (
            each.name,
            *load_cells(each.result),
            *map(figure, (each.batch_mean, each.known_mb, each.end_mb, each.row_bytes)),
        )
        for each in points
    ]
    head = ("", *LOAD_HEAD, "heartbeats a transaction", "MB, known", "MB at the end", "history bytes")
    return (
        _INTRO,
        markdown(head, rows),
        "p50 to p99 count from the moment at which a heartbeat was due; in the last line, from its send. CPU and "
        f"bytes are per heartbeat. The daemon needs {figure(known_bytes(points[:-1]))} bytes for each device "
        "that it knows.",
    )
