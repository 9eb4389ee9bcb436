"""The finding of a run: verdicts and figures, written as a table, as JSON, in the summary and on a page."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.report import Percentiles, Result, Verdict

RESULTS: Final = Path(__file__).resolve().parent / "results"
PAGE: Final = RESULTS.parents[1] / "docs" / "performance.md"
NOT_QUIET: Final = "Not a quiet machine: these figures are provisional."
# the kernel itself uses a few percent of a core
_QUIET_CORES: Final = 0.1
_SIGNS: Final = {"at_most": "≤", "at_least": "≥"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of one run. `figures` are texts by name, for the terminal; `details` are numbers, for the JSON
    file."""

    name: str
    title: str
    verdicts: tuple[Verdict, ...]
    figures: Mapping[str, str]
    details: Mapping[str, object] = field(default_factory=dict)
    # cores that were busy with other work, for each part of the run
    others_cores: tuple[float, ...] = ()
    # a section of docs/performance.md: the text above the verdicts, then the parts below them
    page: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        """Return whether every limit was kept."""
        return all(verdict.ok for verdict in self.verdicts)


def worst(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return one verdict per name: of several verdicts with the same name, a broken one if there is any."""
    by_name: dict[str, Verdict] = {}
    for each in sorted(verdicts, key=lambda verdict: verdict.ok):
        by_name.setdefault(each.name, each)
    return list(by_name.values())


def show(what: str | Table) -> None:
    """Print to standard output; a table in a file or a pipe is 100 characters wide."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(what, soft_wrap=isinstance(what, str), highlight=False)


def figure(value: float | None) -> str:
    """Return a number with three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"


def spread(of: Percentiles) -> str:
    """Return the percentiles as one line of text."""
    values = {"p50": of.p50_ms, "p95": of.p95_ms, "p99": of.p99_ms, "max": of.max_ms}
    return ", ".join(f"{name} {'-' if ms is None else f'{ms:.2f} ms'}" for name, ms in values.items())


# the columns of a load in a table of results
LOAD_HEAD: Final = ("heartbeats/s", "p50 ms", "p95 ms", "p99 ms", "daemon µs", "PostgreSQL µs", "core", "others' cores")


def load_cells(of: Result) -> tuple[str, ...]:
    """Return the cells of a load: rate, latencies, CPU per heartbeat, cores."""
    cores = ("-" if each is None else f"{each:.2f}" for each in (of.daemon_cores, of.others_cores))
    return *map(figure, (of.rate_per_s, of.p50_ms, of.p95_ms, of.p99_ms, of.daemon_us, of.postgres_us)), *cores


def is_quiet(others_cores: Iterable[float]) -> bool:
    """Return whether the machine did little other work. `others_cores`: cores busy with other work, per part of a
    run."""
    return max(others_cores, default=0) <= _QUIET_CORES


def table_of(figures: Mapping[str, str], verdicts: Iterable[Verdict]) -> Table:
    """Return figures and verdicts as a table for the terminal."""
    out = Table(show_header=False, box=None, padding=(0, 1))
    for name, text in figures.items():
        out.add_row(name, text)
    for name, value, limit, mark in map(verdict_cells, verdicts):
        out.add_row(name, f"{value}  ({limit})  {mark.strip('*')}", style=None if mark == "kept" else "red")
    return out


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown with its first column aligned to the left; a pipe within a cell is escaped."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    escaped = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped)


def verdict_cells(verdict: Verdict) -> tuple[str, str, str, str]:
    """Return name, value, limit and mark of a verdict."""
    limit = f"{_SIGNS[verdict.kind]} {figure(verdict.limit)}"
    return verdict.name, figure(verdict.value), limit, "kept" if verdict.ok else "**broken**"


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write JSON with a line per value, which is readable and works with diff."""

    def one_line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, default=asdict)

    body = ",\n".join(f"  {one_line(key)}: {one_line(value)}" for key, value in values.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


def write(finding: Finding, out: Path) -> Path:
    """Write the finding to NAME.json, with the time and the machine of the measurement, and the verdicts of every
    finding in the folder to summary.md; return the path of NAME.json."""
    path = out / f"{finding.name}.json"
    values: dict[str, object] = {"ok": finding.ok, "name": finding.name, "title": finding.title}
    values |= {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    values |= {"verdicts": finding.verdicts, "figures": finding.figures, "details": finding.details}
    write_json(path, values)
    findings = [json.loads(each.read_text(encoding="utf-8")) for each in sorted(out.glob("*.json"))]
    rows = [(each["name"], *verdict_cells(Verdict(**verdict))) for each in findings for verdict in each["verdicts"]]
    table = markdown(("scenario", "what", "value", "limit", ""), rows)
    text = f"# Results\n\nWritten by `python -m bench`; bench/README.md says what is measured.\n\n{table}\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return path


def section(finding: Finding) -> str:
    """Return a finding's section of the page in Markdown."""
    intro, *body = finding.page
    where, cores = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {machine()}", finding.others_cores
    written = (
        f"`make bench-{finding.name}` writes this section. Measured {where}. {median(cores):.2f} cores (median), "
        f"{max(cores):.2f} (at most) were busy with something else."
    )
    if not is_quiet(cores):
        written += f" **{NOT_QUIET}**"
    verdicts = markdown(("verdict", "value", "limit", ""), map(verdict_cells, finding.verdicts))
    return "\n\n".join(filter(None, (intro, written, verdicts, *body)))


def write_page(page: Path, finding: Finding) -> None:
    """Write a finding's section between its two markers on the page, and leave everything else unchanged."""
    text, name = page.read_text(encoding="utf-8"), finding.name
    begin, end = f"<!-- {name}:begin, written by `make bench-{name}` -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f'the page has no markers "{begin}" and "{end}"')
    page.write_text(f"{head}{begin}\n\n{section(finding)}\n\n{end}{tail}", encoding="utf-8")


def machine() -> str:
    """Return a description of the machine on which the figures were measured."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown CPU")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {model}, {ram:.0f} GB, Linux {platform.release()}, Python {python}"
