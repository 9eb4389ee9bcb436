"""`python -m tests.faults --seeds 1-100`: each seed on a PostgreSQL of its own, which goes with it."""

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


async def one(seed: int, devices: int, seconds: float, logs: Path | None) -> Outcome:
    """One seed's life, on a cluster of its own. Where something is wrong, the logs go to `logs`."""
    with guarding() as guard:
        async with (
            running(guard) as cluster,
            living(guard, cluster.dsn, seed=seed, devices=devices, cluster=cluster) as world,
        ):
            outcome = await live(world, seconds)
            if outcome.violations and logs is not None:
                await asyncio.to_thread(_keep_logs, world.folder, logs / f"seed-{seed}")
            return outcome


def _keep_logs(folder: Path, to: Path) -> None:
    for path in folder.rglob("*.log"):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main(
    seeds: Annotated[str, typer.Option(help="One, or the first and the last: 1-100.")] = "1",
    devices: Annotated[int, typer.Option(min=1)] = 40,
    seconds: Annotated[float, typer.Option(min=1, help="Of faults, each seed.")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table as docs/reliability.md has it.")] = False,
    logs: Annotated[Path | None, typer.Option(help="Where the logs of a seed go in which something is wrong.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON there after each seed.")] = None,
) -> None:
    """Break everything, heal it, compare. Exit code 1: something was lost, doubled, wrong or stuck."""
    console = Console(stderr=as_json or as_markdown, width=120)
    log.setup("warning")
    outcomes: list[Outcome] = []
    for seed in _seeds(seeds):
        outcome = uvloop.run(one(seed, devices, seconds, logs))
        outcomes.append(outcome)
        figures = ", ".join(f"{outcome.count(word)} {word}" for word in report.WORDS)
        console.print(
            f"seed {seed}: {len(outcome.struck)} faults in {outcome.seconds:.0f} s, {figures}", highlight=False
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
