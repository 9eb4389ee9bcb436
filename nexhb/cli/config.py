"""nexhb config check: is the configuration usable, and what does it come to?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, SecretStr

from nexhb import cli, dburl, pgfiles
from nexhb.config import Settings
from nexhb.configfile import find_file
from nexhb.errors import ConfigError
from nexhb.http import tls

_commands = typer.Typer(no_args_is_help=True, help="The configuration.")
cli.app.add_typer(_commands, name="config")


@_commands.callback(help="The configuration.")
def _group() -> None:
    pass


@_commands.command(
    help="""
    Read the configuration as the daemon would, and print each value as the file takes it (TOML). Secrets are not shown.
    """
)
def check(as_json: cli.Json = False) -> None:
    settings = cli.settings()
    refuse_unusable(settings)
    if doubt := settings.heartbeat.doubt():
        typer.echo(f"warning: {doubt}. Hint: {settings.heartbeat.remedy()}.", err=True)
    if as_json:
        cli.show(_values(settings))
        return
    typer.echo(f"# file: {find_file(cli.chosen_config()) or 'none, defaults and environment'}")
    typer.echo("\n".join(toml_lines(settings)))


def refuse_unusable(settings: Settings) -> None:
    """Raise ConfigError for what the start or the nightly run would fail at: files that the settings name, and folders
    that cannot be made or written by this user."""
    tls.context(settings.server)
    if settings.database.url is not None:
        pgfiles.check(dburl.parse(settings.database.url.get_secret_value()), "database.url")
    _refuse_folder("data_dir", settings.data_dir)
    if settings.archive_url.startswith("file://"):
        _refuse_folder("archive.url", Path(settings.archive_url.removeprefix("file://")))


def _refuse_folder(key: str, folder: Path) -> None:
    try:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ConfigError(f"{key}: {there} is not a folder.")
        if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            what = "cannot be written" if there == folder else f"cannot be made: {there} cannot be written"
            raise ConfigError(
                f"{key}: {folder} {what} by user id {os.geteuid()}.",
                hint="Run this as the daemon's user; or change the folder's owner, or mount it read-write.",
            )
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: {error.strerror}.") from None


def toml_lines(settings: Settings) -> Iterator[str]:
    """Every key with its value, a line each. What is not set, or secret, is a comment."""
    for section, value in settings:
        keys = {f"{section}.{name}": inner for name, inner in value} if isinstance(value, BaseModel) else {}
        for key, inner in (keys or {section: value}).items():
            if inner is None:
                yield f"# {key} is not set"
            elif isinstance(inner, SecretStr):
                yield f"# {key} is set, and not shown"
            else:
                yield f"{key} = {_toml(_plain(inner))}"


def _values(settings: Settings) -> dict[str, Any]:
    return {
        section: {name: _plain(inner) for name, inner in value} if isinstance(value, BaseModel) else _plain(value)
        for section, value in settings
    }


def _plain(value: Any) -> Any:
    """As the file takes it, in the types that JSON and TOML share."""
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value.absolute() if isinstance(value, Path) else value)  # of a SecretStr: asterisks


def _duration(value: timedelta) -> str:
    """`7 days`, `5 minutes`, or what is left: `90 seconds`."""
    seconds = value / timedelta(seconds=1)
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds and seconds % length == 0:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{int(seconds) if seconds.is_integer() else f'{seconds:.6f}'} seconds"


def _toml(value: Any) -> str:
    """A TOML value: JSON's, but for DEL, which a TOML string takes only escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
