"""The command line: each command has its own file. This file has the app, the shared functions and the exit codes.

A command imports only its own file and what that file needs: importing everything takes twice as long as all of
`nexhb status`.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import orjson
import typer
import uvloop

from nexhb import __version__, log
from nexhb import config as configuration
from nexhb.config import Settings
from nexhb.errors import BadInput, ConfigError, LockHeld, NexhbError

if TYPE_CHECKING:
    from nexhb.postgres.connections import Connection, Database

# Command → its module in nexhb.cli, in the order of the help.
COMMANDS = {
    "archive": "archive",
    "audit": "audit",
    "backfill": "backfill",
    "device": "fleet",
    "devices": "devices",
    "doctor": "doctor",
    "fleet": "fleet",
    "get": "fleet",
    "history": "fleet",
    "incident": "incident",
    "offline": "fleet",
    "unity-down": "fleet",
    "uptime": "uptime",
    "nightly": "jobs",
    "reconcile": "jobs",
    "import-legacy": "legacy",
    "migrate": "migrate",
    "notify": "notify",
    "partitions": "partitions",
    "serve": "serve",
    "silence": "silence",
    "sites": "sites",
    "status": "status",
    "config": "config",
    "database": "database",
    "flags": "flags",
    "perf-diff": "perf_diff",
}

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LOCK_HELD = 3

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
T = TypeVar("T")

_config_file: ContextVar[Path | None] = ContextVar("config_file", default=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"nexhb {__version__}")
        raise typer.Exit


@app.callback(help="nexhb ingests the heartbeats of a fleet of Android kiosks and never loses one.")
def options(
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", help="TOML file. Default: $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml."
        ),
    ] = None,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _config_file.set(config_file)


def chosen_config() -> Path | None:
    """Return the path given with --config."""
    return _config_file.get()


def settings(*, for_daemon: bool = False) -> Settings:
    """Load the settings, and set the log up accordingly (a command logs warnings only). Raises ConfigError."""
    loaded = configuration.load(chosen_config())
    log.setup(loaded.log_level if for_daemon else "warning")
    return loaded


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one command's coroutine on uvloop. uvloop.run is not used: if no event loop can be created, the wrapper
    coroutine of uvloop.run is never awaited, which prints a warning."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work)
    finally:
        work.close()  # if no event loop could be created, the coroutine was never awaited


@asynccontextmanager
async def opened_database(settings: Settings) -> AsyncIterator[Database]:
    """Open the daemon's database, which must have the schema of this nexhb. A command creates neither the
    database nor the schema."""
    from nexhb.postgres import cluster, migrate  # noqa: PLC0415 - most of the import time of a command

    async with cluster.open_database(settings) as database:
        async with database.connected(application="nexhb command") as conn:
            await migrate.require_current_schema(conn)
        yield database


@asynccontextmanager
async def opened_connection(settings: Settings, **options: Any) -> AsyncIterator[Connection]:
    """Open one connection to the daemon's database. `options` are those of Database.connect."""
    from nexhb.postgres import cluster, migrate  # noqa: PLC0415 - see opened_database

    async with cluster.open_connection(settings, **options) as conn:
        await migrate.require_current_schema(conn)
        yield conn


def show(value: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(orjson.dumps(value, default=str, option=orjson.OPT_UTC_Z).decode() + "\n")


def register(command: str | None = None) -> None:
    """Import the file of this command, which registers the command. If no command has this name, import the files of
    all commands. Raises UnsupportedLibrary."""
    modules = [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in modules:
        importlib.import_module(f"nexhb.cli.{module}")


def _command(words: Sequence[str]) -> str | None:
    """Return the command among the arguments; None if there is none."""
    remaining = iter(words)
    for word in remaining:
        if word == "--config":
            next(remaining, None)
        elif not word.startswith("-"):
            return word
    return None


def main() -> None:
    """Run the command line. An error that a person can correct is one sentence on stderr, and no traceback."""
    _open_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what a terminal lacks, without an error
            stream.reconfigure(errors="backslashreplace")
    try:
        register(_command(sys.argv[1:]))
        try:
            app()
        finally:
            sys.stdout.flush()  # before the exit, so that a full disk gives an error message
    except BrokenPipeError:  # the reader of the output has ended, for example `| head`
        _end("", EXIT_FAILED)
    except (ConfigError, BadInput) as error:
        _end(f"{error}", EXIT_USAGE)
    except LockHeld as error:
        _end(f"{error}", EXIT_LOCK_HELD)
    except (NexhbError, OSError) as error:
        _end(f"{error}", EXIT_FAILED)
    except Exception as error:
        if not _is_database_error(error):
            raise
        _end(f"database error: {error}", EXIT_FAILED)


def _is_database_error(error: Exception) -> bool:
    asyncpg = sys.modules.get("asyncpg")  # None if it was never imported: then the error is not asyncpg's
    return asyncpg is not None and isinstance(error, (asyncpg.PostgresError, asyncpg.InterfaceError))


def _end(message: str, code: int) -> NoReturn:
    """Exit with one sentence. Output that stdout or stderr does not accept is dropped without an error."""
    with suppress(OSError):
        if message:
            typer.echo(f"nexhb: {message}", err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _open_standard_files() -> None:
    """Open each of stdin, stdout and stderr that is closed (`2>&-`). Otherwise the next file or connection would get
    the closed stream's file descriptor, and receive the stream's output."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # open uses the lowest free file descriptor, which is `number`
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open until the exit
