"""nexhb archive: what is archived, is it whole, and how it comes back."""

from __future__ import annotations

import csv
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import typer
from rich.console import Console

from nexhb import cli, daemon, partitions
from nexhb.archive import adopt, catalog, get, restore, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.store import ListedStore, open_store
from nexhb.cli import progress, tables
from nexhb.db import Connection
from nexhb.errors import BadInput, DayAttached, NexhbError
from nexhb.jobs.runner import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_S
from nexhb.locks import Lock, held

_commands = typer.Typer(no_args_is_help=True, help="Archived days.")
cli.app.add_typer(_commands, name="archive")

MOST_DAYS = 3_660  # of a range: a typing error is no order


@dataclass(frozen=True)
class _House:
    conn: Connection
    store: ListedStore
    spool: Path


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
        yield _House(conn, store, settings.data_dir / "spool")


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
        manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256, house.spool)
    except NexhbError as error:
        return found | {"error": str(error)}
    await catalog.verified(house.conn, archived.url, daemon.utc_now())
    return found | {"rows": manifest.rows}


@_commands.command(
    name="restore",
    help="""
    Bring a day back, or each day of a range. It is not archived again until it is released. Exit code 1: some day could
    not be restored; the others were. Exit code 3: the nightly run is at work.
    """,
)
def restore_days(
    days: Annotated[
        str, typer.Argument(metavar="DAY|FROM..TO", help="A UTC day, or a range of days: 2026-11-01..2026-11-24.")
    ],
    into: Annotated[
        str | None, typer.Option(help="A table to make, with device_id and every column; the days stay as they are.")
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", help="The opposite: the next nightly run may archive the days again.")
    ] = False,
    as_json: cli.Json = False,
) -> None:
    if into is not None and release:
        raise BadInput("restore takes --into or --release, not both.")
    if into is not None and not into.strip():
        raise BadInput("--into takes the name of a table.")
    wanted = parsed_days(days)

    async def work() -> list[dict[str, Any]]:
        async with _house() as house, held(house.conn, Lock.NIGHTLY, wait=False):
            if into:
                return [await _restore_into(house, wanted, into)]
            do = _released if release else _restored
            if len(wanted) == 1:
                return [await do(house, wanted[0])]
            return [await _one_of_many(do, house, day) for day in wanted]

    with _busy("Restoring …"):
        done = cli.run(work())
    failed = [one for one in done if one.get("error")]
    if as_json:
        cli.show(done[0] if len(wanted) == 1 or into else {"days": done, "failed": len(failed)})
    else:
        for one in done:
            typer.echo(_told(one))
        if len(wanted) > 1 and not into:
            typer.echo(f"{len(done)} days, {len(failed)} failed.")
    raise typer.Exit(cli.EXIT_FAILED if failed else 0)


def _told(one: dict[str, Any]) -> str:
    if said := one.get("error") or one.get("unchanged"):
        return f"{one['day']}: {said}"
    if "released" in one:
        return f"{one['released']} will be archived again by the next nightly run."
    return f"{one['rows']:,} rows of {one['day']} are in {one['table']}."


def parsed_days(text: str) -> list[date]:
    """The days that `2026-11-24`, `20261124` or `2026-11-01..2026-11-24` names. Raises BadInput."""
    first, several, last = text.partition("..")
    ends = [_parsed_day(first), _parsed_day(last if several else first)]
    days = (ends[1] - ends[0]).days + 1
    if not 0 < days <= MOST_DAYS:
        raise BadInput(f"{text} is no range of 1 to {MOST_DAYS:,} days.", hint="The first day comes first.")
    return partitions.days_between(*ends)


def _parsed_day(text: str) -> date:
    for form in ("%Y-%m-%d", "%Y%m%d"):
        with suppress(ValueError):
            return datetime.strptime(text, form).replace(tzinfo=UTC).date()
    raise BadInput(f"{text!r} is no UTC day.", hint="A day is 2026-11-24, a range 2026-11-01..2026-11-24.")


async def _one_of_many(
    do: Callable[[_House, date], Awaitable[dict[str, Any]]], house: _House, day: date
) -> dict[str, Any]:
    """What became of the day: one that fails stops no other. Raises where the connection is lost."""
    try:
        return await do(house, day)
    except DayAttached as error:
        return {"day": day, "unchanged": str(error)}
    except NexhbError as error:
        return {"day": day, "error": str(error)}
    except asyncpg.PostgresError as error:
        if house.conn.is_closed():
            raise
        return {"day": day, "error": f"The database says: {error}"}


async def _released(house: _House, day: date) -> dict[str, Any]:
    return {"day": day, "released": await catalog.release(house.conn, day)}


async def _restore_into(house: _House, days: list[date], into: str) -> dict[str, Any]:
    found = [one for day in days for one in await catalog.find(house.conn, day)]
    archives = list({one.url: one for one in found}.values())  # a partition may hold several of the days
    rows = await restore.restore_into(house.conn, house.store, archives, into, house.spool)
    return {"day": days[0] if len(days) == 1 else f"{days[0]}..{days[-1]}", "table": into, "rows": rows}


async def _restored(house: _House, day: date) -> dict[str, Any]:
    detached = await catalog.find_detached(house.conn, day)
    archives = [detached] if detached else await catalog.find(house.conn, day)
    rows = await restore.restore_day(house.conn, house.store, archives, daemon.utc_now(), house.spool)
    return {"day": day, "table": archives[0].partition, "rows": rows}


@_commands.command(
    name="adopt",
    help="""
    Read the store's manifests into the catalog: of a new database, or of one out of a backup; and take the store for
    the right one where it was moved. Nothing that the catalog has is overwritten. Exit code 1: a conflict, or a
    manifest that is damaged. Exit code 3: the nightly run is at work.
    """,
)
def adopt_archives(
    take: Annotated[
        list[str] | None,
        typer.Option(help="Of several archives of one day, the one that counts: its manifest's URL. May be repeated."),
    ] = None,
    verify_all: Annotated[bool, typer.Option("--verify", help="Read back every byte before it is adopted.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew: though the store has none of the archives known there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: cli.Json = False,
) -> None:
    wishes = adopt.Wishes(frozenset(take or ()), verify=verify_all, force=force, dry_run=dry_run)

    async def work(tell: adopt.Tell) -> adopt.Report:
        async with _house() as house, held(house.conn, Lock.NIGHTLY, wait=False):
            return await adopt.adopt(house.conn, house.store, house.spool, daemon.utc_now(), wishes=wishes, tell=tell)

    with progress.shown("Adopting") as tell:
        report = cli.run(work(tell))
    if as_json:
        cli.show({"dry_run": dry_run, **asdict(report)})
    else:
        for verdict in ("adopted", "superseded", "present", "conflicts", "refused"):
            for one in getattr(report, verdict):
                said = f": {one['reason']}" if one.get("reason") else ""
                typer.echo(f"{verdict:10}  {one.get('day', ''):10}  {one['url']}{said}")
        typer.echo(
            f"{len(report.adopted)} adopted, {report.known} known, {len(report.superseded)} superseded, "
            f"{len(report.present)} of days that are here, {len(report.conflicts)} conflicts, "
            f"{len(report.refused)} refused" + (" (dry run)." if dry_run else ".")
        )
    raise typer.Exit(0 if report.good else cli.EXIT_FAILED)


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
            return await get.heartbeats_of(house.store, archives, device, house.spool)

    with _busy("Reading …"):
        rows = cli.run(work())
    if as_json:
        cli.show({"device_id": device, "day": day.date(), "heartbeats": rows})
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
