"""The curve as tables and charts for docs/performance.md. Pure but for `write`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.compare.bars import Bar, Part, svg
from bench.compare.found import busy
from bench.compare.page import NOT_QUIET, between, table, verdict_table
from bench.curve.found import Curve, Point
from bench.curve.wanted import BATCH_FILLED, BUSY_SHARE, CORE_SHARE, LOOP_LAG_S, QUEUE_WAIT_S
from bench.finding import figure, quiet
from bench.report import Verdict, write_text

BEGIN: Final = "<!-- curve:begin, written by `make bench-curve` -->"
END: Final = "<!-- curve:end -->"
_ALT: Final = {"curve-cpu": "CPU per heartbeat by rate", "curve-latency": "p99 by rate"}


def write(page: Path, curve: Curve, verdicts: Sequence[Verdict], where: str) -> None:
    """Put tables into the page, charts into the folder of its name beside it."""
    folder = page.with_suffix("")
    for name, text in charts(curve).items():
        write_text(folder / f"{name}.svg", text)
    found = section(curve, verdicts, where, folder.name)
    write_text(page, between(page.read_text(encoding="utf-8"), found, BEGIN, END))


def section(curve: Curve, verdicts: Sequence[Verdict], where: str, folder: str) -> str:
    """All of it in Markdown; `where`: when and on what."""
    others = [point.others_cores for point in curve.points]
    parts = [
        "## The fleet's curve",
        "One daemon. Each line is a run with a fresh daemon and database, which know as many devices as the fleet has, "
        "each heard once before the window begins; in the window heartbeats come at the fleet's rate at 60 s, each "
        "from another device, in an order of chance.",
        f"`make bench-curve` writes this section. Measured {where}. {busy(others).capitalize()} while it ran."
        + ("" if quiet(others) else f" {NOT_QUIET}"),
        verdict_table(verdicts),
        "### Latency and CPU",
        *(f"![{alt}]({folder}/{name}.svg)" for name, alt in _ALT.items()),
        _speed(curve.points),
        "p50 to p99 from the moment each heartbeat was due; at the ceiling, a closed loop, from its send. CPU is of "
        "one heartbeat; the core is the daemon's share of one.",
        "### What says when to add a daemon",
        _signals(curve.points),
        _formula(),
        "### Memory and bytes",
        _sizes(curve.points),
        f"The daemon takes {figure(curve.known_bytes)} bytes for each device that it knows, and "
        f"{figure(curve.heard_bytes)} more for each that it has heard since its start (negative: what it took for "
        "reading the tokens was enough); nothing for a heartbeat once it is answered. WAL is of a heartbeat in the "
        "window, its last status with it; history and last status are tables with their indexes.",
    ]
    if curve.idle:
        lines = "\n".join(f"- {name}: {text}" for name, text in curve.idle.items())
        parts += ["### Connections", f"`python -m bench idle`, bench/results/idle.json:\n\n{lines}"]
    return "\n\n".join(parts)


def _speed(points: Sequence[Point]) -> str:
    rows = (
        (
            _named(point),
            figure(point.sent_per_s),
            figure(point.latency.p50_ms),
            figure(point.latency.p95_ms),
            figure(point.latency.p99_ms),
            figure(point.cpu.daemon_us),
            figure(point.cpu.postgres_us),
            f"{point.daemon_cores:.2f}",
            f"{point.others_cores:.2f}",
        )
        for point in points
    )
    head = ("", "heartbeats/s", "p50 ms", "p95 ms", "p99 ms", "daemon µs", "PostgreSQL µs", "core", "others' cores")
    return table(head, rows)


def _signals(points: Sequence[Point]) -> str:
    rows = (
        (
            _named(point),
            f"{point.daemon_cores:.2f}",
            figure(point.batch_mean),
            "-" if point.signals.batch_filled is None else f"{point.signals.batch_filled:.1%}",
            figure(point.queue_wait_ms),
            figure(point.loop_lag_ms),
            f"{point.wanted}",
        )
        for point in points
    )
    head = ("", "core", "heartbeats a batch", "of batch_max", "queue wait p99 ms", "loop lag p99 ms", "daemons wanted")
    return table(head, rows)


def _formula() -> str:
    return (
        f"Daemons wanted, as `nexhb:daemons_wanted` of packaging/prometheus has it: the cores that daemons use, "
        f"divided by {CORE_SHARE:g}, rounded up; one more than there are where that is enough and yet heartbeats "
        f"wait longer than {QUEUE_WAIT_S * 1e3:g} ms for the writer (p99 of each batch's oldest), the event loop "
        f"wakes more than {LOOP_LAG_S * 1e3:g} ms late (p99), or batches are over {BATCH_FILLED:.0%} full, provided "
        f"that daemons use more than {BUSY_SHARE:g} of a core each: with less it is PostgreSQL that they wait for. "
        "By hand, from two looks at /metrics: [Capacity](runbook.md#capacity)."
    )


def _sizes(points: Sequence[Point]) -> str:
    rows = (
        (
            _named(point),
            figure(point.devices),
            f"{point.start_s:.1f}",
            figure(point.first_per_s),
            figure(point.memory.known_mb),
            figure(point.memory.heard_mb),
            figure(point.memory.end_mb),
            figure(point.row_bytes),
            figure(point.wal_bytes),
            figure(point.status_bytes),
        )
        for point in points
    )
    head = (
        "", "devices known", "start s", "first heartbeats/s", "MB, known", "heard once", "at the end",
        "history bytes", "WAL bytes", "last status bytes a device",
    )  # fmt: skip
    return table(head, rows)


def _named(point: Point) -> str:
    if point.due_per_s is None:
        return f"ceiling, {point.devices:,} devices"
    return f"{point.devices:,} devices, {point.due_per_s:,.0f}/s"


# ── charts ───────────────────────────────────────────────────────────────────────────────────────────────


def charts(curve: Curve) -> Mapping[str, str]:
    """Name → SVG."""
    cpu = [
        Bar(
            _named(point),
            (Part(point.cpu.daemon_us, "ours"), Part(point.cpu.postgres_us, "second")),
            f"{figure(point.cpu.daemon_us)} + {figure(point.cpu.postgres_us)} µs",
        )
        for point in curve.points
    ]
    latency = [
        Bar(
            _named(point),
            (Part(point.latency.p50_ms or 0, "ours"), Part(_beyond(point), "other")),
            f"{figure(point.latency.p50_ms)}, {figure(point.latency.p99_ms)} ms",
        )
        for point in curve.points
    ]
    return {
        "curve-cpu": svg("CPU per heartbeat", cpu, (("ours", "daemon"), ("second", "PostgreSQL"))),
        "curve-latency": svg("Latency", latency, (("ours", "p50"), ("other", "to p99"))),
    }


def _beyond(point: Point) -> float:
    return max(0.0, (point.latency.p99_ms or 0) - (point.latency.p50_ms or 0))
