"""nexhb nightly, nexhb reconcile: run a job now, with or without a running daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from nexhb import cli, clock
from nexhb.jobs.registry import MAX_ROWS, Jobs
from nexhb.jobs.runner import JobRun

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, without doing it.")]


def _run(work: Callable[[Jobs], Awaitable[JobRun]]) -> JobRun:
    async def with_database() -> JobRun:
        settings = cli.settings()
        async with cli.opened_database(settings) as database:
            return await work(Jobs(database, settings, clock.system_now))

    return cli.run(with_database())


def _end(run: JobRun, as_json: bool) -> None:
    if as_json:
        cli.show(run.as_dict())
    else:
        for step in run.counts.get("plan", []):
            typer.echo(f"{step['step']:9} {step['target']}: {step['reason']}")
        if confirmation := run.counts.get("asks"):
            typer.echo(f"The run would stop for a confirmation: {confirmation}")
        rest = ", ".join(f"{name} {value}" for name, value in run.counts.items() if name not in ("plan", "asks"))
        typer.echo(
            f"{run.job}: {run.status}" + (f" ({run.reason})" if run.reason else "") + (f": {rest}" if rest else "")
        )
    codes = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}
    raise typer.Exit(codes.get(run.status, cli.EXIT_FAILED))


@cli.app.command(
    help="Create future partitions, archive and drop old partitions, vacuum. Exit code 3: another process runs it."
)
def nightly(
    dry_run: DryRun = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Confirm a run that would archive most of the days, or whose clock looks wrong."),
    ] = False,
    as_json: cli.Json = False,
) -> None:
    _end(_run(lambda jobs: jobs.nightly(dry_run=dry_run, confirmed=yes)), as_json)


@cli.app.command(help="Repair device_last_status from the last 24 hours. Exit code 3: another process runs this job.")
def reconcile(
    dry_run: DryRun = False,
    max_rows: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Maximum number of repairs; the next run continues from there.")
    ] = MAX_ROWS,
    as_json: cli.Json = False,
) -> None:
    _end(_run(lambda jobs: jobs.reconcile(dry_run=dry_run, max_rows=max_rows)), as_json)
