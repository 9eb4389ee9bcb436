"""What a scenario came to: its verdicts, and its figures for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from bench.report import Percentiles, Result, Verdict
from bench.trial import Trial

NOT_QUIET: Final = "Not a quiet machine: these figures are provisional."
# a few percent are the kernel's own
_QUIET_CORES: Final = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """One scenario. `figures` are the lines for a person: name → text; `details` is everything, for a file."""

    name: str
    title: str
    verdicts: tuple[Verdict, ...]
    figures: Mapping[str, str]
    details: Mapping[str, object] = field(default_factory=dict)
    # that were busy with something else, of each run for which a command wants it said at its end
    others_cores: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every limit was kept."""
        return all(verdict.ok for verdict in self.verdicts)

    def to_json(self) -> dict[str, object]:
        """All of it."""
        found = {"ok": self.ok, **asdict(self)}
        del found["others_cores"]  # the details have it, by run
        return found


def of_trial(name: str, title: str, trial: Trial, **more: str) -> Finding:
    """The finding of a load that was compared with the database."""
    result = trial.result
    figures = {
        "acknowledged": f"{result.ok:,} of {result.sent:,} sent, {result.rate_per_s:,.0f}/s",
        "latency": spread(result),
        "rows": f"{trial.check.lines[0].found:,} found, {trial.check.lines[0].expected:,} expected",
        "daemon": f"{trial.memory.rss_mb:g} MB"
        + ("" if result.server_cpu_s is None else f", {result.server_cpu_s:g} s of CPU"),
        **more,
        **others(result),
    }
    return Finding(name, title, result.verdicts, figures, trial.to_json())


def others(*results: Result) -> dict[str, str]:
    """A line for a machine that did something else meanwhile; none for a quiet one, or where it is not known."""
    cores = [found for result in results if (found := result.extra.get("others_cores")) is not None]
    if quiet(cores):
        return {}
    return {"not quiet": f"up to {max(cores):.2f} cores were busy with something else"}


def quiet(others_cores: Sequence[float]) -> bool:
    """Whether the machine did little else; `others_cores`: busy with something else, of each run."""
    return max(others_cores, default=0) <= _QUIET_CORES


def spread(of: Percentiles | Result) -> str:
    """Latencies on a line."""
    return f"p50 {_ms(of.p50_ms)}, p95 {_ms(of.p95_ms)}, p99 {_ms(of.p99_ms)}, max {_ms(of.max_ms)}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"


def figure(value: float | None) -> str:
    """A number for a person: three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"


def row(cells: Sequence[str]) -> str:
    """A line of a table in Markdown; a pipe within a cell ends no cell."""
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
