"""What a run recorded and what is said about it: arrays, a result, verdicts, table and JSON."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Final, Literal

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]  # the package carries no types
from rich.console import Console
from rich.table import Table

# a device gives up after 30 s; two minutes hold a heartbeat that was tried more than once
_HIGHEST_US: Final = 600_000_000


class Outcome(IntEnum):
    """What became of one send."""

    PENDING = 0
    WRITTEN = 1
    DEDUPLICATED = 2
    REFUSED = 3
    FAILED = 4


@dataclass(slots=True)
class SendLog:
    """Every send of a run in 21 bytes: the device, the heartbeat's ts, what became of it, how long it took.

    A check compares it with the database: each acknowledged (device, bucket) must be there.
    """

    device: array[int] = field(default_factory=lambda: array("i"))
    ts_us: array[int] = field(default_factory=lambda: array("q"))
    outcome: array[int] = field(default_factory=lambda: array("b"))
    # seconds until the answer; NaN unless it was a 2xx
    latency_s: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        """How many sends."""
        return len(self.device)

    def add(self, device: int, ts_us: int) -> int:
        """Note a send that starts now; its number."""
        self.device.append(device)
        self.ts_us.append(ts_us)
        self.outcome.append(Outcome.PENDING)
        self.latency_s.append(math.nan)
        return len(self.device) - 1

    def extend(self, other: SendLog) -> None:
        """Take in another log's sends."""
        self.device.extend(other.device)
        self.ts_us.extend(other.ts_us)
        self.outcome.extend(other.outcome)
        self.latency_s.extend(other.latency_s)

    def count(self, outcome: Outcome) -> int:
        """How many sends ended so."""
        return self.outcome.tobytes().count(bytes((outcome,)))

    def acked(self) -> Iterator[tuple[int, int]]:
        """(device index, ts in µs since 1970) of each send that got a 2xx."""
        for device, ts_us, outcome in zip(self.device, self.ts_us, self.outcome, strict=True):
            if outcome in (Outcome.WRITTEN, Outcome.DEDUPLICATED):
                yield device, ts_us

    def latencies(self) -> list[float]:
        """Seconds of each acknowledged send."""
        return [value for value in self.latency_s if not math.isnan(value)]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies in milliseconds; None where nothing was acknowledged."""

    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


def percentiles(latencies_s: Sequence[float]) -> Percentiles:
    """Percentiles by an HDR histogram of three significant figures; the largest one is exact."""
    if not latencies_s:
        return Percentiles()
    histogram = HdrHistogram(1, _HIGHEST_US, 3)
    for latency in latencies_s:
        histogram.record_value(min(_HIGHEST_US, max(1, int(latency * 1e6))))
    p50, p95, p99 = (histogram.get_value_at_percentile(p) / 1e3 for p in (50, 95, 99))
    return Percentiles(p50, p95, p99, round(max(latencies_s) * 1e3, 3))


def latencies_due(offset_us: Sequence[int], latency_s: Sequence[float], start_s: float, end_s: float) -> list[float]:
    """Those of the acknowledged sends that were due within a stretch of an open loop; both sequences by send."""
    return [
        latency
        for offset, latency in zip(offset_us, latency_s, strict=False)
        if start_s <= offset / 1e6 < end_s and not math.isnan(latency)
    ]


# ── result ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Limit:
    """A number that a result must keep to: `field` at most (or at least) `limit`."""

    name: str
    field: str
    limit: float
    kind: Literal["at_most", "at_least"] = "at_most"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit, and whether it was kept; a value of None (nothing was measured) never is."""

    name: str
    limit: float
    value: float | None
    ok: bool
    kind: Literal["at_most", "at_least"] = "at_most"


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `sent` = `ok` + `refused` + `failed` are requests: a retried heartbeat counts each time."""

    mode: str
    devices: int
    duration_s: float
    sent: int
    ok: int
    refused: int
    failed: int
    deduplicated: int
    # of the acknowledged ones, from the intended send time
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    rate_per_s: float
    # answers by HTTP status, and failures by reason
    statuses: Mapping[str, int]
    failures: Mapping[str, int]
    # how late the generator itself was: intended time to the write (or the wait for a connection)
    late_sends_p99_ms: float | None
    late_sends_max_ms: float | None
    connections_opened: int
    generator_cpu_s: float
    generator_cpu_us_per_send: float
    server_cpu_s: float | None = None
    server_tree_cpu_s: float | None = None
    # what a mode has to add: replayed queues, retries, the expected number of rows
    extra: Mapping[str, float | int | None] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @property
    def verdicts_ok(self) -> bool:
        """Whether every limit was kept."""
        return all(verdict.ok for verdict in self.verdicts)


ALL_ACKNOWLEDGED: Final = (
    Limit("nothing refused", "refused", 0),
    Limit("nothing failed", "failed", 0),
    Limit("heartbeats acknowledged", "ok", 1, "at_least"),
)


def judge(result: Result, limits: Iterable[Limit]) -> Result:
    """The result with one more verdict per limit."""
    return replace(result, verdicts=(*result.verdicts, *(_verdict(result, limit) for limit in limits)))


def _verdict(result: Result, limit: Limit) -> Verdict:
    """Hold one limit against the field (or extra) it names."""
    value = result.extra[limit.field] if limit.field in result.extra else getattr(result, limit.field)
    return hold(limit, value)


def hold(limit: Limit, value: float | None) -> Verdict:
    """Hold one limit against a value."""
    kept = value is not None and (value <= limit.limit if limit.kind == "at_most" else value >= limit.limit)
    return Verdict(limit.name, limit.limit, value, ok=kept, kind=limit.kind)


def to_json(result: Result) -> dict[str, object]:
    """The contract's keys and the rest."""
    return asdict(result)


def write_json(path: Path, result: Result) -> None:
    """Write the result as JSON."""
    write_text(path, json.dumps(to_json(result), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside its place and rename it there: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def table(result: Result) -> Table:
    """The result for a person."""
    out = Table(title=f"{result.mode}: {result.devices:,} devices, {result.duration_s:g} s", title_justify="left")
    out.add_column("what")
    out.add_column("value", justify="right")
    out.add_column("limit", justify="right")
    out.add_column("")
    for name in ("sent", "ok", "refused", "failed", "deduplicated", "p50_ms", "p95_ms", "p99_ms", "max_ms"):
        out.add_row(name, _number(getattr(result, name)))
    out.add_row("rate_per_s", _number(result.rate_per_s))
    out.add_section()
    for label, counts in (("status", result.statuses), ("failed by", result.failures)):
        for key, number in sorted(counts.items()):
            out.add_row(f"{label} {key}", _number(number))
    for name in ("late_sends_p99_ms", "generator_cpu_s", "generator_cpu_us_per_send", "server_cpu_s"):
        out.add_row(name, _number(getattr(result, name)))
    for key, extra in result.extra.items():
        out.add_row(key, _number(extra))
    out.add_section()
    for verdict in result.verdicts:
        mark = "[green]kept[/]" if verdict.ok else "[red]broken[/]"
        out.add_row(verdict.name, _number(verdict.value), _number(verdict.limit), mark)
    return out


def say_broken(console: Console, verdicts: Iterable[Verdict], of: str = "") -> None:
    """How many limits were broken, as the last line: it stands below all that scrolled by."""
    if broken := sum(not verdict.ok for verdict in verdicts):
        limits = "limit" if broken == 1 else "limits"
        console.print(f"[red]{broken} {limits} broken{of}.[/]", soft_wrap=True, highlight=False)


def _number(value: float | None) -> str:
    """A number for a table cell."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
