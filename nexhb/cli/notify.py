"""nexhb notify: messages about incidents. The commands query the running daemon."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from nexhb import cli
from nexhb.cli.daemon_client import call
from nexhb.errors import DeliveryFailed

_commands = typer.Typer(no_args_is_help=True, help="Messages about incidents.")
cli.app.add_typer(_commands, name="notify")

TEST_TIMEOUT_S = 45.0  # more than the daemon's own limit of a delivery


@_commands.callback(help="Messages about incidents.")
def _group() -> None:
    pass


@_commands.command(
    name="test", help="Send a test message on a route of the running daemon at once. Exit code 1 if it fails."
)
def send_test(
    route: Annotated[str, typer.Argument(metavar="ROUTE", help="The name of a route in notify.routes.")],
    as_json: cli.Json = False,
) -> None:
    path = f"/v1/notify/{quote(route, safe='')}/test"
    result = cli.run(call(cli.settings(), "POST", path, timeout_s=TEST_TIMEOUT_S))
    if as_json:
        cli.show(result)
    if not result["delivered"]:
        raise DeliveryFailed(result["error"])
    if not as_json:
        typer.echo(f"{route}: delivered, {result['id']}")
