"""nexhb database: whether the database is an older copy, and the word to go on with it."""

from __future__ import annotations

import typer

from nexhb import cli, identity
from nexhb.config import Settings
from nexhb.identity import Missing

_commands = typer.Typer(
    invoke_without_command=True,
    help="Whether the database is an older copy of itself; `accept` goes on with it as it is.",
)
cli.app.add_typer(_commands, name="database")


async def _look(settings: Settings) -> list[Missing]:
    async with cli.opened_connection(settings, application="nexhb database", lock_timeout="10000") as conn:
        return await identity.missing(conn, settings.data_dir)


async def _accept(settings: Settings) -> list[Missing]:
    async with cli.opened_connection(settings, application="nexhb database", lock_timeout="10000") as conn:
        return await identity.accept(conn, settings.data_dir)


@_commands.callback(help="Whether the database is an older copy. Exit code 1 where it is, and nobody has accepted it.")
def show(context: typer.Context, as_json: cli.Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    found = cli.run(_look(cli.settings()))
    if as_json:
        cli.show({"older": bool(found), "missing": _shown(found)})
    else:
        for one in found:
            typer.echo(f"The database is an older copy: it lacks generation {one.generation}, seen by {one.host}.")
        typer.echo("`nexhb database accept` goes on with it." if found else "The database is no older copy.")
    raise typer.Exit(cli.EXIT_FAILED if found else 0)


@_commands.command(
    help="""
    Go on with an older copy of the database, in every daemon: tokens that it does not know are answered 401 again.

    Devices that were added since the copy was made are lost with it. Add them again first, with the tokens that they
    have (`nexhb devices import`): after five 401 in a row a device erases its credentials.
    """
)
def accept(as_json: cli.Json = False) -> None:
    found = cli.run(_accept(cli.settings()))
    if as_json:
        cli.show({"accepted": _shown(found)})
        return
    for one in found:
        typer.echo(f"Accepted: generation {one.generation}, seen by {one.host}, is lost.")
    if not found:
        typer.echo("There is nothing to accept: the database is no older copy.")


def _shown(found: list[Missing]) -> list[dict[str, object]]:
    return [one._asdict() for one in found]
