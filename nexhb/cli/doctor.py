"""nexhb doctor: is all well?"""

from __future__ import annotations

import typer

from nexhb import cli, cluster, daemon
from nexhb import doctor as practice


async def _visit() -> list[practice.Line]:
    settings = cli.settings()
    async with cluster.open_connection(
        settings, application="nexhb doctor", command_timeout_s=30, lock_timeout="5000"
    ) as conn:
        return await practice.examine(conn, settings, daemon.utc_now())


@cli.app.command(
    help="""
    A line a question, good or bad, with what mends it. Exit code 1 where one is bad: made for cron.

    It judges the database and what lies in it, also while the daemon is stopped. Whether that serves, `nexhb
    status` says.
    """
)
def doctor(as_json: cli.Json = False) -> None:
    lines = cli.run(_visit())
    if as_json:
        cli.show(practice.shown(lines))
    else:
        for line in lines:
            typer.echo(f"{'good' if line.good else 'BAD '}  {line.name:15}  {line.said}")
            if not line.good and line.remedy:
                typer.echo(f"{'':23}→ {line.remedy}")
    raise typer.Exit(0 if all(line.good for line in lines) else cli.EXIT_FAILED)
