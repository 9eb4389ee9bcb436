"""nexhb uptime: for how long devices, sites or the fleet were up, read from the running daemon."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import typer

from nexhb import cli, clock
from nexhb.cli import tables
from nexhb.cli.daemon_client import call, download
from nexhb.config import Settings, parse_duration
from nexhb.errors import BadInput

TIMEOUT_S = 60.0  # for a page: the present day of 500 devices takes seconds in the evening
DAY = timedelta(days=1)
KEYS = {"device": ("device_id", "name", "site"), "site": ("site",), "fleet": ()}
SUMS = (
    "share", "days", "days_missing", "closed_minutes", "ours_minutes", "heard_minutes", "replayed_minutes",
    "off_minutes", "unknown_minutes", "unity_minutes", "battery_least", "flaps", "reboots",
)  # fmt: skip


@cli.app.command(
    name="uptime",
    help="Show for which share of their opening hours devices, sites or the fleet were up. Today counts up to now.",
)
def show_uptime(
    *,
    by: Annotated[
        Literal["device", "site", "fleet"] | None,
        typer.Option(
            help="A line for each device or site, or one for the fleet. Default: site with --site, else device."
        ),
    ] = None,
    site: Annotated[str | None, typer.Option(help="Only days at this site.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only devices with this tag.")] = None,
    device: Annotated[str | None, typer.Option(help="Only the device with this id.")] = None,
    last: Annotated[
        str | None, typer.Option(help="Only the last days, including today: 7d. Default: 7d, or 7 days before --to.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="The first UTC day: 2026-11-24.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="The UTC day after the last one. Default: tomorrow.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    as_json: cli.Json = False,
) -> None:
    if as_csv and as_json:
        raise BadInput("--csv and --json exclude each other.")
    chosen = by or ("site" if site is not None and device is None and tag is None else "device")
    values = {"by": chosen, "site": site, "tag": tag, "device": device, "from": _first(last, start, end), "to": end}
    parameters = {name: value for name, value in values.items() if value is not None}
    settings = cli.settings()
    if as_csv:
        path = f"/v1/uptime?{urlencode(parameters | {'format': 'csv'})}"
        cli.run(download(settings, path, sys.stdout.buffer.write))
        return
    found = cli.run(_pages(settings, parameters))
    if as_json:
        cli.show(found)
        return
    columns = (*KEYS[chosen], *SUMS)
    tables.show(columns, _rows(columns, found["uptime"]))
    if found["left_out"]:
        typer.echo(f"Not included, because of the number of devices: {found['left_out']} of their last days.", err=True)


def _first(last: str | None, start: str | None, end: str | None) -> str | None:
    """Return the first day. The last days end with today, by this machine's clock."""
    if last is None:
        return start
    if start is not None or end is not None:
        raise BadInput("--last excludes --from and --to.")
    try:
        length = parse_duration(last)
    except ValueError as error:
        raise BadInput(f"--last {error}.") from None
    if not isinstance(length, timedelta) or length < DAY or length % DAY:
        raise BadInput("--last takes a number of days such as 7d.")
    if length > 10_000 * DAY:
        raise BadInput("--last takes 731d at most.")
    return f"{clock.system_now().date() + DAY - length}"


async def _pages(settings: Settings, parameters: dict[str, str]) -> dict[str, Any]:
    """Return the first page with the rows of all pages."""
    found: dict[str, Any] = {}
    following: str | None = None
    while not found or following is not None:
        asked = parameters if following is None else parameters | {"after": following}
        page = await call(settings, "GET", f"/v1/uptime?{urlencode(asked)}", timeout_s=TIMEOUT_S)
        following = page["next"]
        rows, left_out = found.get("uptime", []) + page["uptime"], found.get("left_out", 0) + page["left_out"]
        found = {**(found or page), "uptime": rows, "left_out": left_out, "next": None}
    return found


def _rows(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        share = row["share"]
        shown = row | {"share": None if share is None else f"{100 * share:.2f} %"}
        yield ["" if shown[column] is None else str(shown[column]) for column in columns]
