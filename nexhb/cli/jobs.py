"""nexhb nightly, nexhb reconcile: a job, now, beside a running daemon or without one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from nexhb import cli, daemon
from nexhb.jobs.board import MAX_ROWS, Jobs
from nexhb.jobs.runner import Run

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def _run(work: Callable[[Jobs], Awaitable[Run]]) -> Run:
    async def with_database() -> Run:
        settings = cli.settings()
        async with cli.opened_database(settings) as database:
            return await work(Jobs(database, settings, daemon.utc_now))

    return cli.run(with_database())


def _end(run: Run, as_json: bool) -> None:
    if as_json:
        cli.show(run.shown())
    else:
        for step in run.counts.get("plan", []):
            typer.echo(f"{step['step']:9} {step['target']}: {step['reason']}")
        if asks := run.counts.get("asks"):
            typer.echo(f"It would stop and ask: {asks}")
        rest = ", ".join(f"{name} {value}" for name, value in run.counts.items() if name not in ("plan", "asks"))
        typer.echo(
            f"{run.job}: {run.status}" + (f" ({run.reason})" if run.reason else "") + (f": {rest}" if rest else "")
        )
    codes = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}
    raise typer.Exit(codes.get(run.status, cli.EXIT_FAILED))


@cli.app.command(
    help="Make days ahead, archive and drop what is old, vacuum. Exit code 3 where somebody else is at it."
)
def nightly(
    dry_run: DryRun = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Also where it would ask first: most days would leave, or the clock looks wrong."),
    ] = False,
    as_json: cli.Json = False,
) -> None:
    _end(_run(lambda jobs: jobs.nightly(dry_run=dry_run, yes=yes)), as_json)


@cli.app.command(help="Heal device_last_status from the last 24 hours. Exit code 3 where somebody else is at it.")
def reconcile(
    dry_run: DryRun = False,
    max_rows: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Repairs at most; the next run goes on.")
    ] = MAX_ROWS,
    as_json: cli.Json = False,
) -> None:
    _end(_run(lambda jobs: jobs.reconcile(dry_run=dry_run, max_rows=max_rows)), as_json)
