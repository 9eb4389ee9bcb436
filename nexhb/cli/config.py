"""nexhb config check: validate the configuration, and print the resulting settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, SecretStr

from nexhb import cli
from nexhb.config import Settings, database_url, libpq_files
from nexhb.config.file import find_file
from nexhb.errors import ConfigError
from nexhb.http.transport import tls
from nexhb.messages.routes import routes_of

_commands = typer.Typer(no_args_is_help=True, help="The configuration.")
cli.app.add_typer(_commands, name="config")


@_commands.callback(help="The configuration.")
def _group() -> None:
    pass


@_commands.command(
    help="""
    Read the configuration as the daemon does, and print each value as TOML. Secrets are not shown.
    """
)
def check(as_json: cli.Json = False) -> None:
    settings = cli.settings()
    check_usable(settings)
    if doubt := settings.heartbeat.doubt():
        typer.echo(f"warning: {doubt}. Hint: {settings.heartbeat.remedy()}.", err=True)
    if as_json:
        cli.show(_values(settings))
        return
    typer.echo(f"# file: {find_file(cli.chosen_config()) or 'none, defaults and environment'}")
    typer.echo("\n".join(toml_lines(settings)))


def check_usable(settings: Settings) -> None:
    """Raise ConfigError for settings that would make the start or the nightly run fail: unusable files, folders
    that this user cannot create or write, and routes of services that are not known."""
    tls.context(settings.server)
    routes_of(settings)
    if settings.database.url is not None:
        libpq_files.check(database_url.parse(settings.database.url.get_secret_value()), "database.url")
    _check_folder("data_dir", settings.data_dir)
    if settings.archive_url.startswith("file://"):
        _check_folder("archive.url", Path(settings.archive_url.removeprefix("file://")))


def _check_folder(key: str, folder: Path) -> None:
    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ConfigError(f"{key}: {existing} is not a folder.")
        if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
            problem = "cannot be written" if existing == folder else f"cannot be created: {existing} cannot be written"
            raise ConfigError(
                f"{key}: {folder} {problem} by user id {os.geteuid()}.",
                hint="Run this as the daemon's user; or change the folder's owner, or mount it read-write.",
            )
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: {error.strerror}.") from None


def toml_lines(settings: Settings) -> Iterator[str]:
    """Yield one line for each key, with its value. An unset or secret key is a comment."""
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
    """Return the value as written in the file, in a type that JSON and TOML share."""
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return {name: _plain(inner) for name, inner in value if inner is not None}
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value.absolute() if isinstance(value, Path) else value)  # a SecretStr becomes asterisks


def _duration(value: timedelta) -> str:
    """Return the duration in the largest unit that divides it: `7 days`, `5 minutes`, `90 seconds`."""
    seconds = value / timedelta(seconds=1)
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds and seconds % length == 0:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{int(seconds) if seconds.is_integer() else f'{seconds:.6f}'} seconds"


def _toml(value: Any) -> str:
    """Return the value in TOML, on one line. It is written as in JSON, except that a TOML string must escape DEL, and
    for tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
