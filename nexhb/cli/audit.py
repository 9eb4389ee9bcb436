"""nexhb audit: is everything there that was ever committed?"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from nexhb import audit as ledger
from nexhb import cli


async def _audit(day: datetime) -> ledger.Audit:
    async with cli.opened_connection(cli.settings(), application="nexhb audit", command_timeout_s=600) as conn:
        return await ledger.audit(conn, day.date())


@cli.app.command(help="Hold a day against the ledger of its commits. Exit code 1 where they differ, or rows dangle.")
def audit(
    day: Annotated[datetime, typer.Option(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")],
    as_json: cli.Json = False,
) -> None:
    found = cli.run(_audit(day))
    if as_json:
        cli.show(found.shown())
    else:
        typer.echo(
            f"{found.partition} ({found.state}): {found.written:,} committed, {found.deduplicated:,} deduplicated"
        )
        typer.echo(f"  in its table {found.in_table:,}, in its archive {found.in_archive:,}, late {found.late:,}")
        typer.echo("  nothing is missing" if found.missing == 0 else f"  MISSING: {found.missing:,}")
        if found.dangling_devices or found.dangling_labels:
            typer.echo(
                f"  DANGLING: {found.dangling_devices:,} rows of a device that is not there, "
                f"{found.dangling_labels:,} of a label"
            )
    raise typer.Exit(0 if found.ok else cli.EXIT_FAILED)
