"""nexhb sites: the places of devices, with their time zones and opening hours. The commands query the running
daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from nexhb import cli
from nexhb.cli import tables
from nexhb.cli.daemon_client import RequestRefused, call
from nexhb.config import Settings
from nexhb.devices import sites
from nexhb.errors import BadInput
from nexhb.texts import quoted, shown

_commands = typer.Typer(no_args_is_help=True, help="Manage sites: names, time zones and opening hours.")
cli.app.add_typer(_commands, name="sites")

PAGE = 1_000

SiteId = Annotated[str, typer.Argument(metavar="SITE", help="The site's id, up to 100 characters.")]


@_commands.command(name="set", help="Create a site, or change the fields that are given.")
def set_site(
    site: SiteId,
    name: Annotated[str | None, typer.Option(help="A name for people; empty: none.")] = None,
    zone: Annotated[str | None, typer.Option(help="The time zone, such as Europe/Berlin. Default: UTC.")] = None,
    hours: Annotated[
        str | None,
        typer.Option(help="Opening hours in OpenStreetMap's notation: 'Mo-Sa 08:00-20:00'. Empty: always open."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    given = {"name": name, "zone": zone, "hours": hours}
    stored = cli.run(_set(cli.settings(), site, {field: text for field, text in given.items() if text is not None}))
    if as_json:
        cli.show(stored)
    else:
        typer.echo(f"{shown(site)}: {stored['zone']}, {stored['hours'] or 'always open'}.")


async def _set(settings: Settings, site: str, given: dict[str, str]) -> Any:
    """Set the given fields and keep the others. An empty text takes a field away."""
    try:
        known = await call(settings, "GET", _path(site))
    except RequestRefused as error:
        if error.status != 404:
            raise
        known = {}
    fields = {field: given.get(field, known.get(field)) for field in ("name", "zone", "hours")}
    return await call(settings, "PUT", _path(site), {field: text for field, text in fields.items() if text})


@_commands.command(name="list", help="List sites by id.")
def list_sites(as_json: cli.Json = False) -> None:
    found = cli.run(_all(cli.settings()))
    if as_json:
        cli.show({"sites": found})
        return
    columns = ("site", "name", "zone", "hours", "now", "devices")
    tables.show(columns, (_cells(site) for site in found))


async def _all(settings: Settings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = await call(settings, "GET", f"/v1/sites?{urlencode({'limit': PAGE, 'after': after})}")
        found += page["sites"]
        if page["next"] is None:
            return found
        after = page["next"]


def _cells(site: dict[str, Any]) -> tuple[str, ...]:
    state = "open" if site["open"] else "closed"
    return site["site"], site["name"] or "", site["zone"], site["hours"] or "", state, str(site["devices"])


@_commands.command(
    name="import",
    help="Create or replace the sites of a CSV file, as spreadsheets write it. If a line is bad, nothing is imported.",
)
def import_file(
    file: Annotated[Path, typer.Argument(help="CSV with site, name, zone and hours; an empty cell has the default.")],
    as_json: cli.Json = False,
) -> None:
    if not file.is_file():
        raise BadInput(f"file {quoted(str(file))} not found.")
    count = cli.run(_import(cli.settings(), file))
    if as_json:
        cli.show({"sites": count})
    else:
        typer.echo(f"{count} sites set.")


async def _import(settings: Settings, file: Path) -> int:
    """Return the number of sites. Every line is checked before the first site is set."""
    read = sites.read_file(await asyncio.to_thread(file.read_bytes))
    for site in read:
        fields = {"name": site.name, "zone": site.zone, "hours": site.hours}
        await call(settings, "PUT", _path(site.site), fields)
    return len(read)


@_commands.command(help="Remove a site that has no devices. Revoked devices do not count.")
def remove(site: SiteId, as_json: cli.Json = False) -> None:
    cli.run(call(cli.settings(), "DELETE", _path(site)))
    if as_json:
        cli.show({"site": site, "removed": True})
    else:
        typer.echo(f"{shown(site)} is removed.")


def _path(site: str) -> str:
    return f"/v1/sites/{quote(site, safe='')}"
