"""nexhb serve: the daemon in the foreground."""

from __future__ import annotations

import sys
from contextlib import suppress
from shlex import quote
from typing import Annotated

import typer

from nexhb import cli, config, daemon, keys, log
from nexhb.errors import ConfigError


def welcome_lines(running: daemon.Running) -> list[str]:
    """What a person wants to know first. A log collector gets the same from the event daemon.started."""
    where = running.settings.data_dir.absolute()
    # The other terminal has none of this one's variables, and its command would make a database of its own.
    told = True
    with suppress(ConfigError):  # whoever has no home directory has no default
        told = where != config.default_data_dir({})
    command = f"NEXHB_DATA_DIR={quote(str(where))} .venv/bin/nexhb" if told else ".venv/bin/nexhb"
    return [
        "",
        f"  nexhb serves {running.url}",
        f"  Data:       {where if running.embedded else 'the PostgreSQL of database.url'}",
        f"  Admin key:  {where / keys.FILE}" if running.settings.auth.admin_key is None else "",
        "",
        "  A first heartbeat, from another terminal in this folder:",
        f"    TOKEN=$({command} devices add kiosk-1)",
        f"""    curl -sS {running.url}/v1/heartbeat -H "Authorization: Bearer $TOKEN" \\""",
        """      -H 'Content-Type: application/json' \\""",
        """      -d '{"device_id":"kiosk-1","timestamp_utc":"'$(date -u +%FT%TZ)'","battery":{"pct":87.0}}'""",
        f"""    curl -sS {running.url}/v1/devices/kiosk-1 -H "x-admin: $(cat {quote(str(where / keys.FILE))})\"""",
        "",
        "  Ctrl-C stops it. Nothing that was acknowledged is lost.",
        "",
    ]


def _say(running: daemon.Running) -> None:
    log.say("\n".join(welcome_lines(running)))


def _say_nothing(_running: daemon.Running) -> None:
    """Nobody watches."""


@cli.app.command(help="Run the daemon in the foreground.")
def serve(
    welcome: Annotated[
        bool | None,
        typer.Option(help="Say where it serves and how to send a first heartbeat; else only at a terminal."),
    ] = None,
) -> None:
    watched = sys.stderr.isatty() if welcome is None else welcome
    ready = _say if watched else _say_nothing
    raise typer.Exit(cli.run(daemon.serve(cli.settings(for_daemon=True), ready)))
