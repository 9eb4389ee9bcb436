"""nexhb config check: is the configuration usable, and what does it come to?"""

from __future__ import annotations

import typer

from nexhb import cli
from nexhb.config import find_file

_commands = typer.Typer(no_args_is_help=True, help="The configuration.")
cli.app.add_typer(_commands, name="config")


@_commands.callback(help="The configuration.")
def _group() -> None:
    pass


@_commands.command(help="Read the configuration as the daemon would; secrets are not shown.")
def check(as_json: cli.Json = False) -> None:
    settings = cli.settings()
    values = settings.model_dump(mode="json")
    if as_json:
        cli.show(values)
        return
    typer.echo(f"file: {find_file(cli.chosen_config()) or 'none, defaults and environment'}")
    for section, value in values.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                typer.echo(f"{section}.{key} = {inner}")
        else:
            typer.echo(f"{section} = {value}")
