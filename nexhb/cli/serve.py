"""nexhb serve: the daemon in the foreground."""

from __future__ import annotations

import sys
from contextlib import suppress
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from nexhb import cli, config, keys, log
from nexhb.errors import ConfigError, described

if TYPE_CHECKING:
    from nexhb import daemon


def welcome_lines(running: daemon.Running) -> list[str]:
    """Return the URL, the folder of the data and the next commands, for a person at a terminal. The
    event daemon.started has the URL for a log collector."""
    data_dir = running.settings.data_dir.absolute()
    # Another terminal may lack this terminal's environment; a command there would then use another data_dir.
    needs_variable = True
    with suppress(ConfigError):  # for a user without a home directory, data_dir has no default
        needs_variable = data_dir != config.default_data_dir({})
    command = f"NEXHB_DATA_DIR={quote(str(data_dir))} .venv/bin/nexhb" if needs_variable else ".venv/bin/nexhb"
    return [
        "",
        f"  nexhb serves {running.url}",
        f"  Data:       {data_dir if running.embedded else 'the PostgreSQL of database.url'}",
        f"  Admin key:  {data_dir / keys.FILE}" if running.settings.auth.admin_key is None else "",
        "",
        "  A first heartbeat, from another terminal in this folder:",
        f"    TOKEN=$({command} devices add kiosk-1)",
        f"""    curl -sS {running.url}/v1/heartbeat -H "Authorization: Bearer $TOKEN" \\""",
        """      -H 'Content-Type: application/json' \\""",
        """      -d '{"device_id":"kiosk-1","timestamp_utc":"'$(date -u +%FT%TZ)'","battery":{"pct":87.0}}'""",
        f"""    curl -sS {running.url}/v1/devices/kiosk-1 -H "x-admin: $(cat {quote(str(data_dir / keys.FILE))})\"""",
        "",
        "  Ctrl-C stops the daemon. Nothing that was acknowledged is lost.",
        "",
    ]


def _print_welcome(running: daemon.Running) -> None:
    log.print_text("\n".join(welcome_lines(running)))


def _print_nothing(_running: daemon.Running) -> None:
    pass


@cli.app.command(help="Run the daemon in the foreground.")
def serve(
    welcome: Annotated[
        bool | None,
        typer.Option(help="Print the URL and how to send a first heartbeat. Default: only at a terminal."),
    ] = None,
) -> None:
    # Imported here: no other command needs the daemon, and this import takes half of the time of a start.
    from nexhb import open_files, service  # noqa: PLC0415

    shows_welcome = sys.stderr.isatty() if welcome is None else welcome
    ready = _print_welcome if shows_welcome else _print_nothing
    settings = cli.settings(for_daemon=True)
    open_files.raise_open_files_limit()  # before the event loop opens its own files
    try:
        code = cli.run(service.serve(settings, ready))
    except OSError as error:  # the event loop could not be created
        log.get("daemon").error("daemon.not_started", error=described(error))
        raise
    raise typer.Exit(code)
