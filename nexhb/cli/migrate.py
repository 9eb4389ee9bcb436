"""nexhb migrate: bring the schema up to date."""

from __future__ import annotations

import typer

from nexhb import cli, clock
from nexhb.postgres import cluster
from nexhb.postgres import migrate as migrations


async def _migrate() -> list[str]:
    async with cluster.open_connection(
        cli.settings(), create=True, application="nexhb migrate", lock_timeout="30000"
    ) as conn:
        return await migrations.migrate(conn, clock.system_now())


@cli.app.command(help="Apply the missing migrations. Running it again changes nothing.")
def migrate(as_json: cli.Json = False) -> None:
    applied = cli.run(_migrate())
    if as_json:
        cli.show({"applied": applied})
    else:
        typer.echo("\n".join(f"applied {name}" for name in applied) or "The schema is up to date.")
