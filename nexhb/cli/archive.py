"""nexhb archive: what is archived, is it whole, and how it comes back."""

from __future__ import annotations

import csv
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from nexhb import cli, daemon
from nexhb.archive import catalog, get, restore, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.store import Store, open_store
from nexhb.cli import tables
from nexhb.db import Connection
from nexhb.errors import BadInput, NexhbError
from nexhb.jobs.runner import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_S
from nexhb.locks import Lock, held

_commands = typer.Typer(no_args_is_help=True, help="Archived days.")
cli.app.add_typer(_commands, name="archive")

Day = Annotated[datetime, typer.Argument(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")]


@dataclass(frozen=True)
class _House:
    conn: Connection
    store: Store


@asynccontextmanager
async def _house() -> AsyncIterator[_House]:
    settings = cli.settings()
    async with (
        cli.opened_database(settings) as database,
        open_store(settings.archive_url, settings.archive) as store,
        database.connected(
            application="nexhb archive", command_timeout_s=STATEMENT_TIMEOUT_S, lock_timeout=f"{LOCK_TIMEOUT_MS}"
        ) as conn,
    ):
        yield _House(conn, store)


def _busy(what: str) -> Any:
    return Console(stderr=True).status(what)  # shown where a person watches


@_commands.command(name="list", help="List what is archived, and days that could not be, newest first.")
def list_archives(as_json: cli.Json = False) -> None:

    async def work() -> list[dict[str, Any]]:
        async with _house() as house:
            return [dict(row) for row in await catalog.everything(house.conn)]

    rows = cli.run(work())
    if as_json:
        cli.show({"archives": rows})
        return
    tables.show(("day", "state", "rows", "MiB", "verified", "drilled", "remark"), _cells(rows))


def _cells(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        late = f"supplement {row['supplement_no']}" if row["supplement_no"] else ""
        restored = "restored" if row["restored_at"] else ""
        yield (
            f"{row['range_start']:%Y-%m-%d}", row["state"], f"{row['row_count'] or 0:,}",
            f"{(row['archive_bytes'] or 0) / 2**20:.1f}", _minute(row["verified_at"]), _minute(row["drilled_at"]),
            row["reason"] or late or restored,
        )  # fmt: skip


def _minute(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%MZ}" if moment else ""


@_commands.command(
    name="verify",
    help="""
    Read archives back from the store and compare every byte with their manifests. Exit code 1: one is damaged.
    """,
)
def verify_archives(
    day: Annotated[
        datetime | None, typer.Argument(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every archive there is.")] = False,
    as_json: cli.Json = False,
) -> None:
    if (day is None) != everything:
        raise BadInput("verify takes a day or --all.")

    async def work() -> list[dict[str, Any]]:
        async with _house() as house:
            archives = await catalog.find(house.conn, day.date()) if day else await catalog.every(house.conn)
            return [await _verified(house, archived) for archived in archives]

    with _busy("Reading back …"):
        found = cli.run(work())
    bad = [one for one in found if one["error"]]
    if as_json:
        cli.show({"checked": len(found), "damaged": len(bad), "archives": found})
    else:
        for one in found:
            typer.echo(f"{one['day']}: " + (one["error"] or f"whole, {one['rows']:,} rows"))
        typer.echo(f"{len(found)} archives, {len(bad)} of them damaged or out of reach.")
    raise typer.Exit(cli.EXIT_FAILED if bad else 0)


async def _verified(house: _House, archived: Archived) -> dict[str, Any]:
    found: dict[str, Any] = {"day": f"{archived.start:%Y-%m-%d}", "url": archived.url, "rows": None, "error": None}
    try:
        manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256)
    except NexhbError as error:
        return found | {"error": str(error)}
    await catalog.verified(house.conn, archived.url, daemon.utc_now())
    return found | {"rows": manifest.rows}


@_commands.command(
    name="restore",
    help="Bring a day back. It is not archived again until it is released. Exit code 3: the nightly run is at work.",
)
def restore_day(
    day: Day,
    into: Annotated[
        str | None, typer.Option(help="A table to make, with device_id and every column; the day stays as it is.")
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", help="The opposite: the next nightly run may archive the day again.")
    ] = False,
    as_json: cli.Json = False,
) -> None:
    if into is not None and release:
        raise BadInput("restore takes --into or --release, not both.")
    if into is not None and not into.strip():
        raise BadInput("--into takes the name of a table.")

    async def work() -> dict[str, Any]:
        async with _house() as house, held(house.conn, Lock.NIGHTLY, wait=False):
            if release:
                return {"day": day.date(), "released": await catalog.release(house.conn, day.date())}
            return await _restore(house, day.date(), into)

    with _busy("Restoring …"):
        done = cli.run(work())
    if as_json:
        cli.show(done)
    elif release:
        typer.echo(f"{done['released']} will be archived again by the next nightly run.")
    else:
        typer.echo(f"{done['rows']:,} rows of {done['day']} are in {done['table']}.")


async def _restore(house: _House, day: date, into: str | None) -> dict[str, Any]:
    if into:
        archives = await catalog.find(house.conn, day)
        rows = await restore.restore_into(house.conn, house.store, archives, into)
        return {"day": day, "table": into, "rows": rows}
    detached = await catalog.find_detached(house.conn, day)
    archives = [detached] if detached else await catalog.find(house.conn, day)
    rows = await restore.restore_day(house.conn, house.store, archives, daemon.utc_now())
    return {"day": day, "table": archives[0].partition, "rows": rows}


@_commands.command(
    name="get",
    help="Write one device's heartbeats of an archived day, oldest first, as CSV (or JSON); nothing is restored.",
)
def get_device(
    device: Annotated[str, typer.Option(help="device_id")],
    day: Annotated[datetime, typer.Option(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")],
    as_json: cli.Json = False,
) -> None:

    async def work() -> list[dict[str, str | None]]:
        async with _house() as house:
            archives = await catalog.find(house.conn, day.date())
            return await get.heartbeats_of(house.store, archives, device)

    with _busy("Reading …"):
        rows = cli.run(work())
    if as_json:
        cli.show({"device_id": device, "day": day.date(), "heartbeats": rows})
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
