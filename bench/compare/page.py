"""What a comparison found, as tables and charts for docs/performance.md. Pure but for `write`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from bench import finding
from bench.compare import found as f
from bench.compare.bars import Bar, Part, svg
from bench.finding import figure, quiet, row, spread
from bench.report import Verdict, write_text

BEGIN: Final = "<!-- compare:begin, written by `make bench-compare` -->"
END: Final = "<!-- compare:end -->"
NOT_QUIET: Final = f"**{finding.NOT_QUIET}**"
_ALT: Final = {
    "singles": "heartbeats per second, one a request",
    "connections": "heartbeats per second by number of connections",
    "batches": "heartbeats per second, 500 a request, beside COPY",
    "cpu": "CPU per heartbeat at two rates",
}


class NoPlaceError(ValueError):
    """The page has no two markers to write between."""


def between(text: str, section: str, begins: str = BEGIN, ends: str = END) -> str:
    """The page with this section between its markers, and everything around them as it was."""
    head, begin, rest = text.partition(begins)
    _, end, tail = rest.partition(ends)
    if not begin or not end:
        raise NoPlaceError(f"{begins} and {ends} must stand in the page")
    return f"{head}{begins}\n\n{section.strip()}\n\n{ends}{tail}"


def write(page: Path, found: f.Found, verdicts: Sequence[Verdict], where: str) -> None:
    """Put tables into the page, charts into the folder of its name beside it."""
    folder = page.with_suffix("")
    for name, text in charts(found).items():
        write_text(folder / f"{name}.svg", text)
    write_text(page, between(page.read_text(encoding="utf-8"), section(found, verdicts, where, folder.name)))


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────


def section(found: f.Found, verdicts: Sequence[Verdict], where: str, folder: str) -> str:
    """All of it in Markdown; `where`: when and on what."""
    parts = [
        f"`make bench-compare` writes this section. Measured {where}. "
        f"{f.busy(found.others_cores).capitalize()} while it ran."
        + ("" if quiet(found.others_cores) else f" {NOT_QUIET}"),
        verdict_table(verdicts),
        "### One heartbeat a request",
        _chart("singles", folder),
        _singles(found),
        f"FastAPI's pool and connections are the best of those tried: {_pools(found)}.",
        "### By connections",
        _chart("connections", folder),
        _sides(found),
        "One short try of each; the table before this one has the medians of rounds in turns.",
        "### 500 heartbeats a request",
        _chart("batches", folder),
        _batches(found),
        "### CPU as the fleet grows",
        _chart("cpu", folder),
        _paces(found),
        "### Latency at 2,000 devices",
        f"{spread(found.steady)}, from the moment each heartbeat was due. On the same PostgreSQL a one-row commit took "
        f"{found.least.one_row_commit_ms:g} ms and `SELECT 1` {found.least.select_1_ms:g} ms: "
        f"five commits and 5 ms are {found.p99_bound_ms:g} ms.",
        "### The generator",
        f"Its CPU is the machine's too: {found.generator_us:g} µs for a heartbeat that is sent alone, "
        f"{found.generator_batch_us:g} µs for one of 500. The load average of the last 15 minutes was "
        f"{found.load_average:g} at the end.",
    ]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(row(line) for line in lines)


def _chart(name: str, folder: str) -> str:
    return f"![{_ALT[name]}]({folder}/{name}.svg)"


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Each with its limit, and whether it was kept."""
    signs = {"at_most": "≤", "at_least": "≥"}
    rows = (
        (each.name, figure(each.value), f"{signs[each.kind]} {figure(each.limit)}", "kept" if each.ok else "**broken**")
        for each in verdicts
    )
    return table(("verdict", "value", "limit", ""), rows)


def _singles(found: f.Found) -> str:
    rows = []
    for name, each in found.singles.items():
        cpu = each.cpu
        ratio = "1" if name == f.NEXHB else figure(found.times(name))
        rows.append(
            (
                name,
                figure(each.connections),
                figure(each.median),
                _spread(each.per_s),
                ratio,
                "-" if cpu is None else figure(cpu.daemon_us),
                "-" if cpu is None or name == f.BARE else figure(cpu.postgres_us),
            )
        )
    head = ("", "connections", "heartbeats/s", "rounds", "nexhb's, of it", "CPU µs", "PostgreSQL's")
    return table(head, rows)


def _pools(found: f.Found) -> str:
    return ", ".join(
        f"{pool} and {connections} {figure(per_s)}/s" for (pool, connections), per_s in sorted(found.pools.items())
    )


def _sides(found: f.Found) -> str:
    rows = (
        (figure(connections), figure(side.bare), figure(side.nexhb), f"{side.nexhb / side.bare:.2f}")
        for connections, side in found.sides.items()
    )
    return table(("connections", "bare handler/s", "nexhb/s", "nexhb's, of it"), rows)


def _batches(found: f.Found) -> str:
    rows = [
        (f"COPY, {rows:,} rows a transaction", figure(median(per_s)), _spread(per_s), "", "", "")
        for rows, per_s in found.copies.items()
    ]
    packed = median(found.packed_copy)
    rows.append(("the same, values packed beforehand", figure(packed), _spread(found.packed_copy), "", "", ""))
    for name, each in found.batches.items():
        cpu = ("-", "-") if each.cpu is None else (figure(each.cpu.daemon_us), figure(each.cpu.postgres_us))
        rows.append((name, figure(each.median), _spread(each.per_s), f"{found.of_copy(name):.2f}", *cpu))
    tried = ", ".join(f"{connections} {figure(per_s)}/s" for connections, per_s in found.batch_tries.items())
    head = ("", "heartbeats/s", "rounds", "of COPY", "CPU µs", "PostgreSQL's")
    connections = next(iter(found.batches.values())).connections
    ratios = ", ".join(f"{name} {each.median / packed:.2f}" for name, each in found.batches.items())
    return (
        f"{table(head, rows)}\n\nOver {connections} connections; tried with arrays: {tried}. Of COPY with values "
        f"packed beforehand: {ratios}."
    )


def _paces(found: f.Found) -> str:
    rows = (
        (
            f"{pace.due_per_s:,.0f}/s",
            f"{pace.due_per_s * 60:,.0f}",
            figure(pace.sent_per_s),
            figure(pace.cpu.daemon_us),
            figure(pace.cpu.postgres_us),
            figure(pace.latency.p50_ms),
            figure(pace.latency.p99_ms),
        )
        for pace in found.paces
    )
    return table(("rate", "devices at 60 s", "sent/s", "daemon µs", "PostgreSQL µs", "p50 ms", "p99 ms"), rows)


def _spread(per_s: Sequence[float]) -> str:
    return f"{figure(min(per_s))} to {figure(max(per_s))}" if len(per_s) > 1 else "one"


# ── charts ───────────────────────────────────────────────────────────────────────────────────────────────


def charts(found: f.Found) -> Mapping[str, str]:
    """Name → SVG."""
    singles = [_bar(name, each.median, "/s", ours=name == f.NEXHB) for name, each in found.singles.items()]
    sides = [
        _bar(f"{who}, {connections}", per_s, note, ours=who == f.NEXHB)
        for connections, side in found.sides.items()
        for who, per_s, note in (
            ("bare handler", side.bare, "/s"),
            (f.NEXHB, side.nexhb, f"/s, {side.nexhb / side.bare:.2f}"),
        )
    ]
    batches = [_bar(f"COPY, {rows:,} rows", median(per_s), "/s", ours=False) for rows, per_s in found.copies.items()]
    batches += [
        _bar(name, each.median, f"/s, {found.of_copy(name):.2f}", ours=True) for name, each in found.batches.items()
    ]
    cpu = [
        Bar(
            f"{pace.due_per_s:,.0f}/s ({pace.due_per_s * 60:,.0f} devices)",
            (Part(pace.cpu.daemon_us, "ours"), Part(pace.cpu.postgres_us, "second")),
            f"{figure(pace.cpu.daemon_us)} + {figure(pace.cpu.postgres_us)} µs",
        )
        for pace in found.paces
    ]
    return {
        "singles": svg("Heartbeats per second, one a request, durable but for the bare handler's", singles),
        "connections": svg("Heartbeats per second, by connections", sides),
        "batches": svg("Heartbeats per second, 500 a request, beside COPY alone", batches),
        "cpu": svg("CPU per heartbeat", cpu, (("ours", "daemon"), ("second", "PostgreSQL"))),
    }


def _bar(label: str, per_s: float, unit: str, *, ours: bool) -> Bar:
    return Bar(label, (Part(per_s, "ours" if ours else "other"),), f"{figure(per_s)}{unit}")
