"""What a run prints: the faults by kind, and what held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.record import What
from tests.faults.run import KINDS, Outcome

WORDS = ("lost", "doubled", "wrong", "stuck", "unexpected")


@dataclass
class Line:
    """One kind of fault, over all seeds."""

    kind: str
    times: int = 0
    in_flight: int = 0  # requests without an answer when it struck
    unknown: int = 0  # requests of whose outcome a device did not know, while it lasted
    refused: int = 0
    missed: int = 0  # what it would have broken was not there


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """The table, in the order of the kinds."""
    found = {kind.name: Line(kind.name) for kind in KINDS}
    for struck in (one for outcome in outcomes for one in outcome.struck):
        line = found[struck.fault.kind.name]
        if struck.failed:
            line.missed += 1
            continue
        line.times += 1
        line.in_flight += struck.in_flight
        line.unknown += struck.unknown
        line.refused += struck.refused
    return list(found.values())


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of all seeds together."""
    counts: Counter[What] = Counter()
    for outcome in outcomes:
        counts.update(outcome.counts)
    return {
        "seeds": [outcome.seed for outcome in outcomes],
        "seconds_of_faults": round(sum(outcome.seconds for outcome in outcomes), 1),
        "faults": sum(line.times for line in lines(outcomes)),
        "daemon_starts": sum(outcome.starts for outcome in outcomes),
        "daemons_ended_by_themselves": sum(len(outcome.ended_by_itself) for outcome in outcomes),
        "ready_s_most": round(max((outcome.ready_s for outcome in outcomes), default=0.0), 2),
        "drained_s_most": round(max((outcome.drained_s for outcome in outcomes), default=0.0), 2),
        "attempts": {what.value: counts[what] for what in What},
    } | {word: sum(outcome.count(word) for outcome in outcomes) for word in WORDS}


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of it, for a file."""
    told = [f"seed {outcome.seed}: {one}" for outcome in outcomes for one in outcome.violations]
    return totals(outcomes) | {"kinds": [vars(line) for line in lines(outcomes)], "violations": told}


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table as docs/reliability.md has it."""
    rows = ["| fault | times | in flight | unknown | refused |", "| --- | ---: | ---: | ---: | ---: |"]
    for line in lines(outcomes):
        figures = " | ".join(f"{n:,}" for n in (line.times, line.in_flight, line.unknown, line.refused))
        rows.append(f"| {line.kind} | {figures if line.times else 'skipped | | |'} |")
    return "\n".join([*rows, "", summary(outcomes)])


def summary(outcomes: Sequence[Outcome]) -> str:
    """One sentence of figures."""
    found = totals(outcomes)
    attempts = found["attempts"]
    known = attempts["acknowledged"] + attempts["deduplicated"]
    return (
        f"{len(outcomes)} seeds, {found['seconds_of_faults']:,.0f} s of faults, {found['faults']:,} faults, "
        f"{found['daemon_starts']:,} starts of a daemon ({found['daemons_ended_by_themselves']:,} behind an end of its "
        f"own); {attempts['sent']:,} attempts to send, of them {known:,} acknowledged, {attempts['refused']:,} "
        f"refused, {attempts['unknown']:,} unknown; {attempts['given up']:,} heartbeats given up by their device. "
        f"Ready at most {found['ready_s_most']} s after the healing, drained {found['drained_s_most']} s later. "
        + ", ".join(f"{found[word]:,} {word}" for word in WORDS)
        + "."
    )


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """All of it, for a person."""
    table = Table("fault", title="faults injected", title_justify="left")
    for name in ("times", "in flight", "unknown", "refused", "missed"):
        table.add_column(name, justify="right")
    for line in lines(outcomes):
        figures = (line.times, line.in_flight, line.unknown, line.refused, line.missed)
        table.add_row(line.kind, *(f"{n:,}" for n in figures))
    console.print(table)
    console.print(summary(outcomes), highlight=False)
    for outcome in outcomes:
        for one in outcome.violations[:10]:
            console.print(f"[red]seed {outcome.seed}:[/] ", end="")
            console.print(str(one), highlight=False, markup=False)
