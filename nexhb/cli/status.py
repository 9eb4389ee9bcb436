"""nexhb status: what the running daemon reports about itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from nexhb import cli, keys
from nexhb.cli.daemon_client import DaemonStatus, DaemonUnreachable, query_daemon
from nexhb.errors import NexhbError


@cli.app.command(
    help="Show whether the daemon is ready, and the fleet's counts. Exit code 1 if the daemon is not ready, or the "
    "fleet cannot be read."
)
def status(
    url: Annotated[str | None, typer.Option(help="The daemon's address; default: as configured.")] = None,
    as_json: cli.Json = False,
) -> None:
    try:
        settings = cli.settings()
        daemon = cli.run(query_daemon(settings, url, keys.read(settings)))
    except NexhbError as error:
        if as_json:
            cli.show({"url": url, "reachable": False, "ready": False, "reasons": [str(error)]})
        raise
    if as_json:
        fields = asdict(daemon)
        cli.show(fields if daemon.fleet else {name: value for name, value in fields.items() if name != "fleet"})
    if not daemon.reachable:
        raise DaemonUnreachable(
            f"{daemon.url}: {' '.join(daemon.reasons)}", hint="`nexhb serve` runs it; --url names another address."
        )
    if not as_json:
        _print(daemon)
        if not daemon.fleet:
            typer.echo(f"  fleet: not shown, there is no admin key in the configuration or in {settings.data_dir}")
    raise typer.Exit(0 if daemon.ready and "error" not in daemon.fleet else cli.EXIT_FAILED)


def _print(status: DaemonStatus) -> None:
    typer.echo(f"{status.url}: {'ready' if status.ready else 'NOT READY'}")
    for reason in status.reasons:
        typer.echo(f"  {reason}")
    for name, value in status.fleet.items():
        typer.echo(f"  {name}: {counts(value) if isinstance(value, dict) else value}")


def counts(numbers: dict[str, int]) -> str:
    """Return the numbers that are not 0 with their names."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or "none"
