"""nexhb fleet, offline, unity-down, get, device, history: the fleet and what happened to it, read from the running
daemon."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from nexhb import cli, clock
from nexhb.cli import tables
from nexhb.cli.daemon_client import TIMEOUT_S, call
from nexhb.cli.status import counts
from nexhb.config import Settings, parse_duration
from nexhb.errors import BadInput
from nexhb.texts import shown

_commands = typer.Typer(no_args_is_help=True, help="List devices, sites, events or incidents.")
cli.app.add_typer(_commands, name="get")

FOLLOW_EVERY_S = 1.0
ARCHIVE_TIMEOUT_S = 75.0  # more than the daemon's own limit
MAX_PAGE = 1_000

DEVICES = (
    "device_id", "name", "alias", "site", "tags", "state", "heard_at", "battery_pct", "unity_running",
    "agent_version", "unity_pkg_version", "silenced",
)  # fmt: skip
OFFLINE = ("device_id", "name", "alias", "site", "heard_at", "offline_seconds", "cause", "incident_id", "silenced")
UNITY_DOWN = ("device_id", "name", "alias", "site", "heard_at", "state", "since", "incident_id", "silenced")
SITES = ("site", "name", "zone", "hours", "open", "devices", "online", "offline", "unity_down", "silenced")
EVENTS = ("event_id", "at", "since", "device_id", "site", "kind", "cause", "incident_id")
INCIDENTS = (
    "incident_id", "severity", "kind", "scope", "site", "members", "devices", "cause", "since", "resolved_at",
    "acked_by", "silenced", "named",
)  # fmt: skip
HISTORY = (
    "ts", "received_at", "battery_pct", "plugged", "network_type", "ssid", "signal_dbm", "uptime_s", "unity_running",
    "agent_version", "unity_pkg_version",
)  # fmt: skip

Site = Annotated[str | None, typer.Option(help="Only this site.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The maximum number of lines; default: all.")]
Last = Annotated[str | None, typer.Option(help="Only the last minutes, hours or days: 30m, 12h or 7d.")]
DeviceId = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]

# The options that limit and sort the lists of devices, by the name of their parameter in the request.
FILTERS: Mapping[str, Any] = {
    "state": Annotated[
        str | None,
        typer.Option(help="online, offline, unknown, unity_down, inactive, never_seen or revoked."),
    ],
    "site": Site,
    "tag": Annotated[str | None, typer.Option(help="Only devices with this tag.")],
    "q": Annotated[str | None, typer.Option(help="A part of the id, the name or the alias.")],
    "battery_below": Annotated[int | None, typer.Option(min=1, max=100, help="Only with less battery, in percent.")],
    "clock_wrong": Annotated[bool | None, typer.Option("--clock-wrong/--clock-right", help="By the clock.")],
    "limited": Annotated[bool | None, typer.Option("--limited", help="Only devices that the rate limit slows.")],
    "agent_version": Annotated[str | None, typer.Option(help="Only with this version of the agent.")],
    "agent_version_below": Annotated[str | None, typer.Option(help="Only with an older version of the agent: 1.0.9.")],
    "unity_pkg_version": Annotated[str | None, typer.Option(help="Only with this version of the Unity app.")],
    "unity_pkg_version_below": Annotated[str | None, typer.Option(help="Only with an older version of the Unity app.")],
    "sort": Annotated[
        str | None,
        typer.Option(help="device_id, heard_at (the longest silence first), -heard_at or battery_pct."),
    ],
}


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options of FILTERS, which it receives as keyword arguments."""
    own = [
        each
        for each in inspect.signature(command, eval_str=True).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    ]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in FILTERS.items()
    ]

    @functools.wraps(command)
    def filtered(**given: Any) -> None:
        command(**given)

    filtered.__annotations__ = {each.name: each.annotation for each in (*own, *options)}
    filtered.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined] # what typer reads
    return filtered


# ---- commands -------------------------------------------------------------------------------------------------------


@cli.app.command(help="Count the devices of the fleet by state.")
def fleet(as_json: cli.Json = False) -> None:
    _show_object(_read("/v1/fleet"), as_json)


@cli.app.command(help="List the silent devices, the longest silence first, and why they are silent.")
@_filtered
def offline(
    minutes: Annotated[
        int | None,
        typer.Option(min=1, max=525_600, help="The minimum silence; default: heartbeat.offline_after_seconds."),
    ] = None,
    limit: Limit = None,
    as_json: cli.Json = False,
    **filters: object,
) -> None:
    _list("/v1/devices/offline", "devices", OFFLINE, limit, as_json, minutes=minutes, **filters)


@cli.app.command(name="unity-down", help="List the devices whose Unity app does not run.")
@_filtered
def unity_down(limit: Limit = None, as_json: cli.Json = False, **filters: object) -> None:
    _list("/v1/devices/unity-down", "devices", UNITY_DOWN, limit, as_json, **filters)


@cli.app.command(help="Show a device and its last status.")
def device(device_id: DeviceId, as_json: cli.Json = False) -> None:
    _show_object(_read(f"/v1/devices/{quote(device_id, safe='')}"), as_json)


@cli.app.command(help="List the heartbeats of a device, the newest first.")
def history(
    device_id: DeviceId,
    last: Last = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of lines.")] = 100,
    archived: Annotated[bool, typer.Option("--archived", help="Also read archived days, at most seven.")] = False,
    as_json: cli.Json = False,
) -> None:
    path = f"/v1/devices/{quote(device_id, safe='')}/heartbeats"
    _list(path, "heartbeats", HISTORY, limit, as_json, archived=archived or None, **_since(last))


@_commands.command(name="devices", help="List devices with their last status.")
@_filtered
def get_devices(limit: Limit = None, as_json: cli.Json = False, **filters: object) -> None:
    _list("/v1/devices", "devices", DEVICES, limit, as_json, **filters)


@_commands.command(name="sites", help="List sites with their devices by state.")
def get_sites(limit: Limit = None, as_json: cli.Json = False) -> None:
    _list("/v1/sites", "sites", SITES, limit, as_json)


@_commands.command(name="events", help="List what changed in the fleet, the newest first.")
def get_events(
    *,
    site: Site = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: offline, online, unity_down, …")] = None,
    device: Annotated[str | None, typer.Option(help="Only the device with this id.")] = None,
    last: Last = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", help="Print new events as they happen, one on a line.")] = False,
    as_json: cli.Json = False,
) -> None:
    if follow:
        cli.run(_follow(cli.settings(), _given(site=site, kind=kind, device=device), as_json))
    else:
        _list("/v1/events", "events", EVENTS, limit, as_json, site=site, kind=kind, device=device, **_since(last))


@_commands.command(name="incidents", help="List the open incidents, the newest first.")
def get_incidents(
    site: Site = None,
    show_all: Annotated[bool, typer.Option("--all", help="Also those that are resolved.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of lines.")] = 100,
    as_json: cli.Json = False,
) -> None:
    state = "all" if show_all else "open"
    _list("/v1/incidents", "incidents", INCIDENTS, limit, as_json, state=state, site=site)


# ---- reading --------------------------------------------------------------------------------------------------------


def _given(**parameters: object) -> dict[str, str]:
    return {name: str(value) for name, value in parameters.items() if value is not None}


def _since(last: str | None) -> dict[str, str]:
    """Return the parameter for the time that `last` names, before now by this machine's clock."""
    if last is None:
        return {}
    try:
        length = parse_duration(last)
    except ValueError as error:
        raise BadInput(f"--last {error}.") from None
    if not isinstance(length, timedelta):
        raise BadInput("--last takes a time such as 30m, 12h or 7d.")
    return {"from": _moment(clock.system_now() - length)}


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%S.%fZ}"


def _read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = cli.run(call(cli.settings(), "GET", path))
    return found


async def _page(settings: Settings, path: str, parameters: dict[str, str]) -> dict[str, Any]:
    timeout_s = ARCHIVE_TIMEOUT_S if "archived" in parameters else TIMEOUT_S
    page: dict[str, Any] = await call(settings, "GET", f"{path}?{urlencode(parameters)}", timeout_s=timeout_s)
    return page


async def _pages(
    settings: Settings, path: str, field: str, limit: int | None, parameters: dict[str, str]
) -> dict[str, Any]:
    """Return the first page with the rows of up to `limit` rows of all pages; `next` is that of the last page."""
    rows: list[Any] = []
    found: dict[str, Any] = {}
    while True:
        size = MAX_PAGE if limit is None else min(MAX_PAGE, limit - len(rows))
        page = await _page(settings, path, parameters | {"limit": str(size)})
        rows += page[field]
        found = found or page
        if page["next"] is None or (limit is not None and len(rows) >= limit):
            return {**found, field: rows, "next": page["next"]}
        parameters = parameters | {"after": page["next"]}


def _list(
    path: str, field: str, columns: Sequence[str], limit: int | None, as_json: bool, **parameters: object
) -> None:  # fmt: skip
    found = cli.run(_pages(cli.settings(), path, field, limit, _given(**parameters)))
    if as_json:
        cli.show(found)
        return
    tables.show(columns, _rows(columns, found[field]))
    if found["next"] is not None:
        typer.echo("There are more: raise --limit.", err=True)


async def _follow(settings: Settings, parameters: dict[str, str], as_json: bool) -> None:
    """Print new events until interrupted."""
    newest = (await _page(settings, "/v1/events", {"limit": "1"}))["events"]
    after = str(newest[0]["event_id"]) if newest else "0"
    if not as_json:
        typer.echo("\t".join(EVENTS))
    while True:
        asked = parameters | {"order": "asc", "limit": str(MAX_PAGE), "after": after}
        page = await _page(settings, "/v1/events", asked)
        after = page["next"]
        for event in page["events"]:
            if as_json:
                cli.show(event)
            else:
                typer.echo("\t".join(shown(cell) for row in _rows(EVENTS, [event]) for cell in row))
        await asyncio.sleep(0 if len(page["events"]) == MAX_PAGE else FOLLOW_EVERY_S)


# ---- showing --------------------------------------------------------------------------------------------------------


def _rows(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    return ([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(_cell(item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(inner)}" for name, inner in value.items())
    return str(value)


def _show_object(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        cli.show(found)
        return
    for name, value in found.items():
        is_counts = name == "offline_by_cause"
        typer.echo(f"{name}: {shown(counts(value) if is_counts else _cell(value))}")
