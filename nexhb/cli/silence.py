"""nexhb silence: add, list and remove silences, during which no messages are sent. The commands query the running
daemon."""

from __future__ import annotations

import getpass
import socket
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from nexhb import cli
from nexhb.cli.daemon_client import call
from nexhb.config import parse_duration
from nexhb.errors import BadInput
from nexhb.texts import shown

_commands = typer.Typer(no_args_is_help=True, help="Silences: periods in which no messages are sent.")
cli.app.add_typer(_commands, name="silence")

MAX_LISTED = 1_000


@_commands.callback(help="Silences: periods in which no messages are sent.")
def _group() -> None:
    pass


def _call(method: str, path: str, body: object = None) -> Any:
    return cli.run(call(cli.settings(), method, path, body))


@_commands.command(
    help="Add a silence: `nexhb silence add --site store-42 --for 2h --reason refit`. At its end, messages are sent "
    "about incidents that are still open."
)
def add(
    *,
    reason: Annotated[str, typer.Option(help="Why; shown in the list.")],
    fleet: Annotated[bool, typer.Option("--fleet", help="The whole fleet.")] = False,
    site: Annotated[str | None, typer.Option(help="A site and its devices.")] = None,
    tag: Annotated[str | None, typer.Option(help="All devices with this tag.")] = None,
    device: Annotated[str | None, typer.Option(help="One device.")] = None,
    duration: Annotated[str | None, typer.Option("--for", help="How long, for example 2h or 3 days.")] = None,
    until: Annotated[str | None, typer.Option(help="Its end, a time with zone: 2026-12-24T20:00:00+01:00.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Its beginning; default: now.")] = None,
    hours: Annotated[str | None, typer.Option(help="Let it recur in these hours: Mo-Fr 22:00-06:00.")] = None,
    zone: Annotated[str, typer.Option(help="The time zone of --hours.")] = "UTC",
    as_json: cli.Json = False,
) -> None:
    scopes = {"site": site, "tag": tag, "device": device}
    chosen = [(scope, value) for scope, value in scopes.items() if value is not None]
    if len(chosen) + fleet != 1:
        raise BadInput("Exactly one of --fleet, --site, --tag and --device is required.")
    body: dict[str, Any] = {"scope": "fleet"} if fleet else {"scope": chosen[0][0], "value": chosen[0][1]}
    body |= {"reason": reason, "created_by": this_user()}
    body |= {"from": start} if start else {}
    if duration is not None:
        if until is not None:
            raise BadInput("--for and --until exclude each other.")
        body["until"] = (_moment(start, "--from") + _length(duration)).isoformat()
    elif until is not None:
        body["until"] = _moment(until, "--until").isoformat()
    body |= {"hours": hours, "zone": zone} if hours is not None else {}
    silence = _call("POST", "/v1/silences", body)
    if as_json:
        cli.show(silence)
    else:
        typer.echo(_line(silence))


def this_user() -> str:
    """Return who runs the command, for the records of the daemon."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user of a container may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"[:100]


def _length(text: str) -> timedelta:
    try:
        length = parse_duration(text)
    except ValueError as error:
        raise BadInput(f"--for {error}.") from None
    assert isinstance(length, timedelta)  # noqa: S101 - a text is parsed or raises ValueError
    return length


def _moment(text: str | None, option: str) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise BadInput(f"{option} takes a time with zone, for example 2026-12-24T20:00:00+01:00.")
    return moment


@_commands.command(name="list", help="List the silences that have not ended.")
def list_silences(
    show_all: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
    as_json: cli.Json = False,
) -> None:
    page = _call("GET", f"/v1/silences?limit={MAX_LISTED}" + ("&all=true" if show_all else ""))
    if as_json:
        cli.show(page)
        return
    for silence in page["silences"]:
        typer.echo(_line(silence))


@_commands.command(help="Remove a silence, by its number in the list.")
def remove(silence_id: Annotated[int, typer.Argument(metavar="ID", min=1)]) -> None:
    _call("DELETE", f"/v1/silences/{silence_id}")


def _line(silence: dict[str, Any]) -> str:
    what = silence["scope"] + (f" {shown(silence['value'])}" if silence["value"] else "")
    until = f"until {silence['until']}" if silence["until"] else "without an end"
    recurs = f", in {shown(silence['hours'])} ({silence['zone']})" if silence["hours"] else ""
    state = "active" if silence["active"] else "inactive"
    return (
        f"{silence['silence_id']:>4}  {state:8}  {what}: from {silence['from']} {until}{recurs}; "
        f"{shown(silence['reason'])}, by {shown(silence['created_by'])}"
    )
