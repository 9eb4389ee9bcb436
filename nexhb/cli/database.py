"""nexhb database: report whether the database is an older copy, and accept it."""

from __future__ import annotations

import typer

from nexhb import cli
from nexhb.config import Settings
from nexhb.postgres import identity
from nexhb.postgres.identity import Missing

_commands = typer.Typer(
    invoke_without_command=True,
    help="Show whether the database is an older copy of itself, for example from a backup; `accept` continues with it.",
)
cli.app.add_typer(_commands, name="database")


async def _missing(settings: Settings) -> list[Missing]:
    async with cli.opened_connection(settings, application="nexhb database", lock_timeout="10000") as conn:
        return await identity.missing(conn, settings.data_dir)


async def _accept(settings: Settings) -> list[Missing]:
    async with cli.opened_connection(settings, application="nexhb database", lock_timeout="10000") as conn:
        return await identity.accept(conn, settings.data_dir)


@_commands.callback(help="Show whether the database is an older copy. Exit code 1 if it is, and was not accepted.")
def show(context: typer.Context, as_json: cli.Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    missing = cli.run(_missing(cli.settings()))
    if as_json:
        cli.show({"older": bool(missing), "missing": _as_json(missing)})
    else:
        for lost in missing:
            typer.echo(f"The database is an older copy: it lacks generation {lost.generation}, seen by {lost.host}.")
        typer.echo("`nexhb database accept` accepts it." if missing else "The database is not an older copy.")
    raise typer.Exit(cli.EXIT_FAILED if missing else 0)


@_commands.command(
    help="""
    Accept an older copy of the database, for every daemon: requests with tokens that the copy lacks receive 401 again.

    Devices that were added after the copy was made are missing in the copy. Add them again first, with their present
    tokens (`nexhb devices import`): after five 401 responses in a row, a device erases its credentials.
    """
)
def accept(as_json: cli.Json = False) -> None:
    missing = cli.run(_accept(cli.settings()))
    if as_json:
        cli.show({"accepted": _as_json(missing)})
        return
    for lost in missing:
        typer.echo(f"Accepted: the database lacks generation {lost.generation}, seen by {lost.host}.")
    if not missing:
        typer.echo("There is nothing to accept: the database is not an older copy.")


def _as_json(missing: list[Missing]) -> list[dict[str, object]]:
    return [lost._asdict() for lost in missing]
