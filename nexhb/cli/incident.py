"""nexhb incident: act on an incident. The commands query the running daemon; `nexhb get incidents` lists incidents."""

from __future__ import annotations

from typing import Annotated

import typer

from nexhb import cli
from nexhb.cli.daemon_client import call
from nexhb.cli.silence import this_user
from nexhb.texts import shown

_commands = typer.Typer(no_args_is_help=True, help="Act on an incident.")
cli.app.add_typer(_commands, name="incident")


@_commands.callback(help="Act on an incident.")
def _group() -> None:
    pass


@_commands.command(help="Acknowledge an incident, which stops its reminders. The first acknowledgement counts.")
def ack(
    incident_id: Annotated[int, typer.Argument(metavar="ID", min=1, help="Its number in `nexhb get incidents`.")],
    as_json: cli.Json = False,
) -> None:
    path = f"/v1/incidents/{incident_id}/ack"
    acked = cli.run(call(cli.settings(), "POST", path, {"by": this_user()}))
    if as_json:
        cli.show(acked)
        return
    typer.echo(f"incident {incident_id}: acknowledged at {acked['acked_at']} by {shown(acked['acked_by'])}")
