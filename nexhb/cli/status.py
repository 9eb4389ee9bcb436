"""nexhb status: what the running daemon says of itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from nexhb import cli, keys
from nexhb.cli.asking import Heard, ask
from nexhb.errors import NexhbError


class _NotRunning(NexhbError):
    sentence = "The daemon does not answer."


@cli.app.command(
    help="Is it ready, and how is the fleet? Exit code 1 where it is not ready, or the fleet cannot be read."
)
def status(
    url: Annotated[str | None, typer.Option(help="Where the daemon listens; else as configured.")] = None,
    as_json: cli.Json = False,
) -> None:
    try:
        settings = cli.settings()
        heard = cli.run(ask(settings, url, keys.read(settings)))
    except NexhbError as error:
        if as_json:
            cli.show({"url": url, "reachable": False, "ready": False, "reasons": [str(error)]})
        raise
    if as_json:
        shown = asdict(heard)
        cli.show(shown if heard.fleet else {name: value for name, value in shown.items() if name != "fleet"})
    if not heard.reachable:
        raise _NotRunning(
            f"{heard.url}: {' '.join(heard.reasons)}", hint="`nexhb serve` runs it; --url names another address."
        )
    if not as_json:
        _say(heard)
        if not heard.fleet:
            typer.echo(f"  fleet: not shown, there is no admin key in the configuration nor in {settings.data_dir}")
    raise typer.Exit(0 if heard.ready and "error" not in heard.fleet else cli.EXIT_FAILED)


def _say(heard: Heard) -> None:
    typer.echo(f"{heard.url}: {'ready' if heard.ready else 'NOT READY'}")
    for reason in heard.reasons:
        typer.echo(f"  {reason}")
    for name, value in heard.fleet.items():
        typer.echo(f"  {name}: {value}")
