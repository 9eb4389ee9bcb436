"""nexhb audit: check that every committed heartbeat of a day still exists."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from nexhb import audit as ledger
from nexhb import cli


async def _audit(day: datetime) -> ledger.Audit:
    async with cli.opened_connection(cli.settings(), application="nexhb audit", command_timeout_s=600) as conn:
        return await ledger.audit(conn, day.date())


@cli.app.command(
    help="Compare a day with the ledger of its commits. Exit code 1: they differ, or a row names a missing device."
)
def audit(
    day: Annotated[datetime, typer.Option(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")],
    as_json: cli.Json = False,
) -> None:
    result = cli.run(_audit(day))
    if as_json:
        cli.show(result.as_dict())
    else:
        typer.echo(
            f"{result.partition} ({result.state}): {result.written:,} committed, {result.deduplicated:,} deduplicated"
        )
        typer.echo(f"  in its table {result.in_table:,}, in its archive {result.in_archive:,}, late {result.late:,}")
        typer.echo("  nothing is missing" if result.missing == 0 else f"  MISSING: {result.missing:,}")
        if result.dangling_devices or result.dangling_labels:
            typer.echo(
                f"  DANGLING: {result.dangling_devices:,} rows of a device that does not exist, "
                f"{result.dangling_labels:,} of a label"
            )
    raise typer.Exit(0 if result.ok else cli.EXIT_FAILED)
