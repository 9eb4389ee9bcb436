"""Run `python -m tests.faults --seeds 1-100`. Each seed has its own PostgreSQL, which is deleted after the seed."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from nexhb import log
from tests.faults import report
from tests.faults.cluster import running
from tests.faults.guard import guarding
from tests.faults.run import Outcome, live
from tests.faults.world import living

SECONDS = 20.0


async def run_seed(seed: int, devices: int, seconds: float, logs: Path | None) -> Outcome:
    """Run one seed on a cluster of its own, and return the outcome. On a violation, copy the logs of the run to
    `logs`."""
    with guarding() as guard:
        async with (
            running(guard) as cluster,
            living(guard, cluster.dsn, seed=seed, devices=devices, cluster=cluster) as world,
        ):
            outcome = await live(world, seconds)
            if outcome.violations and logs is not None:
                await asyncio.to_thread(_copy_logs, world.folder, logs / f"seed-{seed}")
            return outcome


def _copy_logs(folder: Path, to: Path) -> None:
    for path in folder.rglob("*.log"):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main(
    seeds: Annotated[str, typer.Option(help="One seed, or the first and the last: 1-100.")] = "1",
    devices: Annotated[int, typer.Option(min=1)] = 40,
    seconds: Annotated[float, typer.Option(min=1, help="How long faults occur, for each seed.")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as it is in docs/reliability.md.")
    ] = False,
    logs: Annotated[Path | None, typer.Option(help="Copy the logs of a seed with a violation to this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON to this file after each seed.")] = None,
) -> None:
    """Inject faults, end them, and compare the database with the devices' journal. Exit with 1 on a violation."""
    console = Console(stderr=as_json or as_markdown, width=120)
    log.setup("warning")
    outcomes: list[Outcome] = []
    for seed in _seeds(seeds):
        outcome = uvloop.run(run_seed(seed, devices, seconds, logs))
        outcomes.append(outcome)
        figures = ", ".join(f"{outcome.count(verdict)} {verdict}" for verdict in report.VERDICTS)
        console.print(
            f"seed {seed}: {len(outcome.injected)} faults in {outcome.seconds:.0f} s, {figures}", highlight=False
        )
        for violation in outcome.violations[:10]:
            console.print(f"  {violation}", highlight=False, markup=False)
        if out is not None:
            out.write_text(json.dumps(report.to_json(outcomes), indent=1))
    if as_json:
        print(json.dumps(report.to_json(outcomes), indent=1))
    elif as_markdown:
        print(report.markdown(outcomes))
    else:
        report.show(console, outcomes)
    raise typer.Exit(1 if any(outcome.violations for outcome in outcomes) else 0)


if __name__ == "__main__":
    typer.run(main)
