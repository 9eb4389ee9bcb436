"""The command `nexhb`: one file a command; here the app, what they share, and the exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import asyncpg
import orjson
import typer
import uvloop

from nexhb import __version__, cluster, log
from nexhb import config as configuration
from nexhb import migrate as migrations
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.errors import BadInput, ConfigError, LockHeld, NexhbError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LOCK_HELD = 3

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
T = TypeVar("T")

_chosen: dict[str, Path | None] = {"config": None}

Json = Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nexhb {__version__}")
        raise typer.Exit


@app.callback(help="nexhb takes the heartbeats of a fleet of Android kiosks and never loses one.")
def options(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file; else $NEXHB_CONFIG, ./nexhb.toml, /etc/nexhb/nexhb.toml."),
    ] = None,
    _shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _chosen["config"] = config_file


def chosen_config() -> Path | None:
    """What --config named."""
    return _chosen["config"]


def settings(*, for_daemon: bool = False) -> Settings:
    """The settings of this call, the log set up as they say (commands show warnings only). Raises ConfigError."""
    found = configuration.load(_chosen["config"])
    log.setup(found.log_level if for_daemon else "warning")
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one command's coroutine on uvloop."""
    return uvloop.run(work)


@asynccontextmanager
async def opened_database(settings: Settings) -> AsyncIterator[Database]:
    """The database of the daemon, with the schema of this nexhb; a command makes neither."""
    async with cluster.open_database(settings) as database:
        async with database.connected(application="nexhb command") as conn:
            await migrations.require(conn)
        yield database


@asynccontextmanager
async def opened_connection(settings: Settings, **how: Any) -> AsyncIterator[Connection]:
    """One connection to it; `how` as Database.connect takes it."""
    async with cluster.open_connection(settings, **how) as conn:
        await migrations.require(conn)
        yield conn


def show(value: object) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(orjson.dumps(value, default=str, option=orjson.OPT_UTC_Z).decode() + "\n")


def register() -> None:
    """Import every command's file: that registers it. Raises UnsupportedLibrary."""
    from nexhb.cli import archive, audit, backfill, devices, doctor, jobs, legacy, migrate, partitions, serve, status  # noqa: F401, PLC0415
    from nexhb.cli import config as _config  # noqa: F401, PLC0415
    from nexhb.cli import database as _database  # noqa: F401, PLC0415
    from nexhb.cli import flags as _flags  # noqa: F401, PLC0415
    from nexhb.cli import perf_diff as _perf_diff  # noqa: F401, PLC0415


def main() -> None:
    """Entry point: errors as one sentence on stderr, never a traceback for what a person can mend."""
    _open_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no Japanese shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        register()
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is an error with a sentence
    except BrokenPipeError:  # `| head` has what it wanted
        _end("", EXIT_FAILED)
    except (ConfigError, BadInput) as error:
        _end(f"{error}", EXIT_USAGE)
    except LockHeld as error:
        _end(f"{error}", EXIT_LOCK_HELD)
    except (NexhbError, OSError) as error:
        _end(f"{error}", EXIT_FAILED)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        _end(f"the database says: {error}", EXIT_FAILED)


def _end(said: str, code: int) -> NoReturn:
    """Exit with one sentence. What stdout or stderr did not take is dropped, and is no second error."""
    with suppress(OSError):
        if said:
            typer.echo(f"nexhb: {said}", err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _open_standard_files() -> None:
    """Where one of the three was closed, `2>&-`, the next file or connection would take its number, and get what is
    printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - to the end
