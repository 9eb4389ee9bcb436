"""The report of a run: the faults by kind, and the numbers of violations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.journal import Event
from tests.faults.run import KINDS, Outcome

VERDICTS = ("lost", "doubled", "wrong", "stuck", "unexpected")


@dataclass
class KindFigures:
    """The figures of one kind of fault, over all seeds."""

    kind: str
    times: int = 0
    in_flight: int = 0  # requests without a response when the faults began
    unknown: int = 0  # attempts during the faults whose outcome the devices do not know
    refused: int = 0
    not_possible: int = 0  # faults that could not be injected


def figures_by_kind(outcomes: Sequence[Outcome]) -> list[KindFigures]:
    """Return the rows of the table, in the order of the kinds."""
    figures = {kind.name: KindFigures(kind.name) for kind in KINDS}
    for injected in (fault for outcome in outcomes for fault in outcome.injected):
        line = figures[injected.fault.kind.name]
        if injected.failed:
            line.not_possible += 1
            continue
        line.times += 1
        line.in_flight += injected.in_flight
        line.unknown += injected.unknown
        line.refused += injected.refused
    return list(figures.values())


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of all seeds together."""
    counts: Counter[Event] = Counter()
    for outcome in outcomes:
        counts.update(outcome.counts)
    return {
        "seeds": [outcome.seed for outcome in outcomes],
        "seconds_of_faults": round(sum(outcome.seconds for outcome in outcomes), 1),
        "faults": sum(line.times for line in figures_by_kind(outcomes)),
        "daemon_starts": sum(outcome.starts for outcome in outcomes),
        "daemons_ended_by_themselves": sum(len(outcome.ended_by_itself) for outcome in outcomes),
        "max_ready_s": round(max((outcome.ready_s for outcome in outcomes), default=0.0), 2),
        "max_drained_s": round(max((outcome.drained_s for outcome in outcomes), default=0.0), 2),
        "attempts": {event.value: counts[event] for event in Event},
    } | {verdict: sum(outcome.count(verdict) for outcome in outcomes) for verdict in VERDICTS}


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return all figures and violations, for a JSON file."""
    violations = [f"seed {outcome.seed}: {violation}" for outcome in outcomes for violation in outcome.violations]
    return totals(outcomes) | {"kinds": [vars(line) for line in figures_by_kind(outcomes)], "violations": violations}


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the table as it is in docs/reliability.md."""
    rows = ["| fault | times | in flight | unknown | refused |", "| --- | ---: | ---: | ---: | ---: |"]
    for line in figures_by_kind(outcomes):
        figures = " | ".join(f"{n:,}" for n in (line.times, line.in_flight, line.unknown, line.refused))
        rows.append(f"| {line.kind} | {figures if line.times else 'skipped | | |'} |")
    return "\n".join([*rows, "", summary(outcomes)])


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the figures of all seeds as text."""
    sums = totals(outcomes)
    attempts = sums["attempts"]
    acknowledged = attempts["acknowledged"] + attempts["deduplicated"]
    return (
        f"{len(outcomes)} seeds, {sums['seconds_of_faults']:,.0f} s of faults, {sums['faults']:,} faults, "
        f"{sums['daemon_starts']:,} starts of a daemon ({sums['daemons_ended_by_themselves']:,} after it ended "
        f"by itself); {attempts['sent']:,} attempts to send, of which {acknowledged:,} were acknowledged, "
        f"{attempts['refused']:,} refused and {attempts['unknown']:,} unknown; "
        f"devices discarded {attempts['discarded']:,} heartbeats. "
        f"Ready at most {sums['max_ready_s']} s after the end of all faults, drained {sums['max_drained_s']} s later. "
        + ", ".join(f"{sums[verdict]:,} {verdict}" for verdict in VERDICTS)
        + "."
    )


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print the table, the figures and the violations for a person."""
    table = Table("fault", title="faults injected", title_justify="left")
    for name in ("times", "in flight", "unknown", "refused", "not possible"):
        table.add_column(name, justify="right")
    for line in figures_by_kind(outcomes):
        figures = (line.times, line.in_flight, line.unknown, line.refused, line.not_possible)
        table.add_row(line.kind, *(f"{n:,}" for n in figures))
    console.print(table)
    console.print(summary(outcomes), highlight=False)
    for outcome in outcomes:
        for violation in outcome.violations[:10]:
            console.print(f"[red]seed {outcome.seed}:[/] ", end="")
            console.print(str(violation), highlight=False, markup=False)
