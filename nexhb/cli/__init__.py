"""The command `nexhb`: one file a command; here the app, what they share, and the exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
    from nexhb.cli import flags as _flags  # noqa: F401, PLC0415
    from nexhb.cli import perf_diff as _perf_diff  # noqa: F401, PLC0415


def main() -> None:
    """Entry point: errors as one sentence on stderr, never a traceback for what a person can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no Japanese shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        register()
        app()
    except (ConfigError, BadInput) as error:
        typer.echo(f"nexhb: {error}", err=True)
        sys.exit(EXIT_USAGE)
    except LockHeld as error:
        typer.echo(f"nexhb: {error}", err=True)
        sys.exit(EXIT_LOCK_HELD)
    except (NexhbError, OSError) as error:
        typer.echo(f"nexhb: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        typer.echo(f"nexhb: the database says: {error}", err=True)
        sys.exit(EXIT_FAILED)
