"""Run `python -m tests.faults.messages --seed 1 --kills 200`. The last line is the verdict; the exit code is 1 if a
promise was broken."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvloop

from nexhb import log
from nexhb.messages.own_outage import TOLD_AFTER
from tests.faults.messages.run import Outcome, Plan, run
from tests.faults.messages.variants import REAL

SHOWN = 20  # violations


def main(
    seed: Annotated[int, typer.Option(help="Determines the kills.")] = 1,
    kills: Annotated[int, typer.Option(min=1)] = 200,
    kiosks: Annotated[int, typer.Option(min=10, help="Kiosks whose battery fails again and again.")] = 24,
    scale: Annotated[
        float, typer.Option(min=0.05, max=1, help="Factor of nexhb's timeouts, leases and pauses; 1: the real ones.")
    ] = 0.1,
    variant: Annotated[str, typer.Option(help="A variant of variants.py, which breaks a promise.")] = REAL,
    log_to: Annotated[
        Path | None, typer.Option(help="Copy the daemon's log to this file if a promise was broken.")
    ] = None,
) -> None:
    """Kill daemon, database and receiver during deliveries; then compare what arrived with what had to."""
    log.setup("warning")
    plan = Plan(seed, kills, kiosks, scale, TOLD_AFTER.total_seconds() * scale, variant)
    outcome = uvloop.run(run(plan, log=log_to))
    for violation in outcome.violations[:SHOWN]:
        print(violation)
    if len(outcome.violations) > SHOWN:
        print(f"and {len(outcome.violations) - SHOWN} more")
    print(verdict(outcome))
    raise typer.Exit(1 if outcome.violations else 0)


def verdict(outcome: Outcome) -> str:
    """Return the figures of a run, and its verdict."""
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(outcome.kills.items()))
    return (
        f"seed {outcome.seed}: {sum(outcome.kills.values())} kills in {outcome.seconds:.0f} s ({kinds}), "
        f"{outcome.hit} of them with a request in flight; {outcome.incidents} incidents, {outcome.messages} messages, "
        f"{outcome.doubles} arrived again; "
        + (f"{len(outcome.violations)} promises broken" if outcome.violations else "every promise kept")
    )


if __name__ == "__main__":
    typer.run(main)
