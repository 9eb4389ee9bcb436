"""nexhb backfill: the last status of every device, from the history."""

from __future__ import annotations

from typing import Annotated

import typer

from nexhb import cli, daemon
from nexhb.cli import progress
from nexhb.jobs.backfill import DAYS_MOST
from nexhb.jobs.board import Jobs
from nexhb.jobs.runner import Run

NEXT_STEP = "nexhb flags set read_from_last_status=on"

EXIT_CODES = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}


async def run(days: int, show: progress.Show) -> Run:
    """The job, with how far it is."""
    settings = cli.settings()
    async with cli.opened_database(settings) as database:
        jobs = Jobs(database, settings, daemon.utc_now)
        return await jobs.backfill(days, lambda done, total, wrote: show(done, total, f"{wrote:,} rows written"))


def say(found: Run) -> None:
    """For people."""
    counts = found.counts
    typer.echo(f"backfill: {found.status}" + (f" ({found.reason})" if found.reason else ""))
    if found.status != "completed":
        return
    typer.echo(f"  devices looked at              {counts['checked']:,}, rows written {counts['updated']:,}")
    typer.echo(f"  devices in device_last_status  {counts['devices']:,}")
    typer.echo(f"  active in the last hour        {counts['active']:,}")
    typer.echo(f"  oldest last heartbeat          {_moment(counts['oldest'])}")
    typer.echo(f"  newest last heartbeat          {_moment(counts['newest'])}")
    typer.echo(f"Next step, fast reads: {NEXT_STEP} (by steps: docs/runbook.md, Rolling out)")


def _moment(value: object) -> str:
    return f"{value:%Y-%m-%d %H:%M:%SZ}" if value else "none"


@cli.app.command(
    help="""
    Fill device_last_status from the history, only where that is newer. Exit code 3 where somebody else is at
    it.
    """
)
def backfill(
    days: Annotated[int, typer.Option(min=1, max=DAYS_MOST, help="How far back the history counts.")] = 7,
    as_json: cli.Json = False,
) -> None:
    with progress.shown("devices") as show:
        found = cli.run(run(days, show))
    if as_json:
        cli.show(found.shown() | {"next_step": NEXT_STEP})
    else:
        say(found)
    raise typer.Exit(EXIT_CODES.get(found.status, cli.EXIT_FAILED))
