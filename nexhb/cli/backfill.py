"""nexhb backfill: fill in the last status of every device from the history."""

from __future__ import annotations

from typing import Annotated

import typer

from nexhb import cli, clock
from nexhb.cli import progress
from nexhb.jobs.backfill import MAX_DAYS
from nexhb.jobs.registry import Jobs
from nexhb.jobs.runner import JobRun

NEXT_STEP = "nexhb flags set read_from_last_status=on"

EXIT_CODES = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}


async def run(days: int, show: progress.Show) -> JobRun:
    """Run the job and report its progress."""
    settings = cli.settings()
    async with cli.opened_database(settings) as database:
        jobs = Jobs(database, settings, clock.system_now)
        return await jobs.backfill(days, lambda done, total, wrote: show(done, total, f"{wrote:,} rows written"))


def print_result(job_run: JobRun) -> None:
    """Print the result of the job for people."""
    counts = job_run.counts
    typer.echo(f"backfill: {job_run.status}" + (f" ({job_run.reason})" if job_run.reason else ""))
    if job_run.status != "completed":
        return
    typer.echo(f"  devices checked                {counts['checked']:,}, rows written {counts['updated']:,}")
    typer.echo(f"  devices in device_last_status  {counts['devices']:,}")
    typer.echo(f"  active in the last hour        {counts['active']:,}")
    typer.echo(f"  oldest last heartbeat          {_moment(counts['oldest'])}")
    typer.echo(f"  newest last heartbeat          {_moment(counts['newest'])}")
    typer.echo(f"Next, turn the fast reads on: {NEXT_STEP} (or gradually: docs/runbook.md, Rolling out)")


def _moment(value: object) -> str:
    return f"{value:%Y-%m-%d %H:%M:%SZ}" if value else "none"


@cli.app.command(
    help="""
    Update device_last_status from the history wherever the history is newer. Exit code 3 if another process holds the
    job's lock.
    """
)
def backfill(
    days: Annotated[int, typer.Option(min=1, max=MAX_DAYS, help="How many days of the history to read.")] = 7,
    as_json: cli.Json = False,
) -> None:
    with progress.shown("devices") as show:
        job_run = cli.run(run(days, show))
    if as_json:
        cli.show(job_run.as_dict() | {"next_step": NEXT_STEP})
    else:
        print_result(job_run)
    raise typer.Exit(EXIT_CODES.get(job_run.status, cli.EXIT_FAILED))
