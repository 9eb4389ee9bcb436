"""nexhb archive: list, verify, restore, adopt and read archived days."""

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

from nexhb import cli, clock, partitions
from nexhb.archive import adopt, catalog, get, restore, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.opening import open_store
from nexhb.archive.store import ListedStore
from nexhb.cli import progress, tables
from nexhb.errors import BadInput, DayAttached, NexhbError
from nexhb.jobs.runner import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_S
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock, held

_commands = typer.Typer(no_args_is_help=True, help="Archived days.")
cli.app.add_typer(_commands, name="archive")

MAX_DAYS = 3_660  # longest range of days; a longer one is taken for a typing error


@dataclass(frozen=True)
class _Archive:
    """The objects that every command of this module needs."""

    conn: Connection
    store: ListedStore
    spool: Path


@asynccontextmanager
async def _open_archive() -> AsyncIterator[_Archive]:
    settings = cli.settings()
    async with (
        cli.opened_database(settings) as database,
        open_store(settings.archive_url, settings.archive) as store,
        database.connected(
            application="nexhb archive", command_timeout_s=STATEMENT_TIMEOUT_S, lock_timeout=f"{LOCK_TIMEOUT_MS}"
        ) as conn,
    ):
        yield _Archive(conn, store, settings.data_dir / "spool")


def _spinner(text: str) -> Any:
    return Console(stderr=True).status(text)  # the text is shown only if stderr is a terminal


@_commands.command(name="list", help="List the archives, and the days whose archiving failed, newest first.")
def list_archives(as_json: cli.Json = False) -> None:

    async def work() -> list[dict[str, Any]]:
        async with _open_archive() as archive:
            return [dict(row) for row in await catalog.list_archives(archive.conn)]

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
    Read archives back from the store and compare every byte with their manifests. Exit code 1: an archive is damaged.
    """,
)
def verify_archives(
    day: Annotated[
        datetime | None, typer.Argument(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify every archive.")] = False,
    as_json: cli.Json = False,
) -> None:
    if (day is None) != everything:
        raise BadInput("Specify either a day or --all.")

    async def work() -> list[dict[str, Any]]:
        async with _open_archive() as archive:
            archives = (
                await catalog.find(archive.conn, day.date()) if day else await catalog.current_archives(archive.conn)
            )
            return [await _verify(archive, archived) for archived in archives]

    with _spinner("Reading back …"):
        results = cli.run(work())
    damaged = [result for result in results if result["error"]]
    if as_json:
        cli.show({"checked": len(results), "damaged": len(damaged), "archives": results})
    else:
        for result in results:
            typer.echo(f"{result['day']}: " + (result["error"] or f"intact, {result['rows']:,} rows"))
        typer.echo(f"{len(results)} archives, {len(damaged)} of them damaged or unreachable.")
    raise typer.Exit(cli.EXIT_FAILED if damaged else 0)


async def _verify(archive: _Archive, archived: Archived) -> dict[str, Any]:
    result: dict[str, Any] = {"day": f"{archived.start:%Y-%m-%d}", "url": archived.url, "rows": None, "error": None}
    try:
        manifest = await verify.verify(
            archive.store, archive.store.name_of(archived.url), archived.sha256, archive.spool
        )
    except NexhbError as error:
        return result | {"error": str(error)}
    await catalog.record_verification(archive.conn, archived.url, clock.system_now())
    return result | {"rows": manifest.rows}


@_commands.command(
    name="restore",
    help="""
    Restore a day, or each day of a range. A restored day is not archived again until it is released. Exit code 1: at
    least one day could not be restored; the others were. Exit code 3: the nightly run is in progress.
    """,
)
def restore_days(
    days: Annotated[
        str, typer.Argument(metavar="DAY|FROM..TO", help="A UTC day, or a range of days: 2026-11-01..2026-11-24.")
    ],
    into: Annotated[
        str | None,
        typer.Option(help="Restore into this new table, with device_id and every column; the days stay archived."),
    ] = None,
    release: Annotated[
        bool,
        typer.Option("--release", help="Release restored days instead: the next nightly run may archive them again."),
    ] = False,
    as_json: cli.Json = False,
) -> None:
    if into is not None and release:
        raise BadInput("Specify either --into or --release, not both.")
    if into is not None and not into.strip():
        raise BadInput("--into requires the name of a table.")
    selected = parse_days(days)

    async def work() -> list[dict[str, Any]]:
        async with _open_archive() as archive, held(archive.conn, Lock.NIGHTLY, wait=False):
            if into:
                return [await _restore_into(archive, selected, into)]
            action = _release if release else _restore
            if len(selected) == 1:
                return [await action(archive, selected[0])]
            return [await _attempt(action, archive, day) for day in selected]

    with _spinner("Restoring …"):
        results = cli.run(work())
    failed = [result for result in results if result.get("error")]
    if as_json:
        cli.show(results[0] if len(selected) == 1 or into else {"days": results, "failed": len(failed)})
    else:
        for result in results:
            typer.echo(_line(result))
        if len(selected) > 1 and not into:
            typer.echo(f"{len(results)} days, {len(failed)} failed.")
    raise typer.Exit(cli.EXIT_FAILED if failed else 0)


def _line(result: dict[str, Any]) -> str:
    if reason := result.get("error") or result.get("unchanged"):
        return f"{result['day']}: {reason}"
    if "released" in result:
        return f"{result['released']} will be archived again by the next nightly run."
    return f"{result['rows']:,} rows of {result['day']} are in {result['table']}."


def parse_days(text: str) -> list[date]:
    """Parse `2026-11-24`, `20261124` or `2026-11-01..2026-11-24` into a list of days. Raises BadInput."""
    first, is_range, last = text.partition("..")
    ends = [_parse_day(first), _parse_day(last if is_range else first)]
    days = (ends[1] - ends[0]).days + 1
    if not 0 < days <= MAX_DAYS:
        raise BadInput(f"{text} is not a range of 1 to {MAX_DAYS:,} days.", hint="Put the earlier day first.")
    return partitions.days_between(*ends)


def _parse_day(text: str) -> date:
    for form in ("%Y-%m-%d", "%Y%m%d"):
        with suppress(ValueError):
            return datetime.strptime(text, form).replace(tzinfo=UTC).date()
    raise BadInput(f"{text!r} is not a day.", hint="Write a day as 2026-11-24, and a range as 2026-11-01..2026-11-24.")


async def _attempt(
    action: Callable[[_Archive, date], Awaitable[dict[str, Any]]], archive: _Archive, day: date
) -> dict[str, Any]:
    """Run `action` on one day of a range. If it fails, the other days still run; raises if the connection is lost."""
    try:
        return await action(archive, day)
    except DayAttached as error:
        return {"day": day, "unchanged": str(error)}
    except NexhbError as error:
        return {"day": day, "error": str(error)}
    except asyncpg.PostgresError as error:
        if archive.conn.is_closed():
            raise
        return {"day": day, "error": f"The database reported: {error}"}


async def _release(archive: _Archive, day: date) -> dict[str, Any]:
    return {"day": day, "released": await catalog.release(archive.conn, day)}


async def _restore_into(archive: _Archive, days: list[date], into: str) -> dict[str, Any]:
    by_url = {archived.url: archived for day in days for archived in await catalog.find(archive.conn, day)}
    archives = list(by_url.values())  # without duplicates: one archive may contain several of the days
    rows = await restore.restore_into(archive.conn, archive.store, archives, into, archive.spool)
    return {"day": days[0] if len(days) == 1 else f"{days[0]}..{days[-1]}", "table": into, "rows": rows}


async def _restore(archive: _Archive, day: date) -> dict[str, Any]:
    detached = await catalog.find_detached(archive.conn, day)
    archives = [detached] if detached else await catalog.find(archive.conn, day)
    rows = await restore.restore_day(archive.conn, archive.store, archives, clock.system_now(), archive.spool)
    return {"day": day, "table": archives[0].partition, "rows": rows}


@_commands.command(
    name="adopt",
    help="""
    Record the store's archives in the catalog of a new database, or of one restored from a backup, and accept a store
    that was moved. Existing catalog entries are not overwritten. Exit code 1: there are conflicts or damaged manifests.
    Exit code 3: the nightly run is in progress.
    """,
)
def adopt_archives(
    chosen: Annotated[
        list[str] | None,
        typer.Option(
            "--take",
            help="If a day has several archives: the manifest URL of the one that counts. May be repeated.",
        ),
    ] = None,
    verify_all: Annotated[
        bool, typer.Option("--verify", help="Read back every byte of an archive before adopting it.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept the store even if it contains none of the archives in the catalog.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, without doing it.")] = False,
    as_json: cli.Json = False,
) -> None:
    options = adopt.AdoptOptions(frozenset(chosen or ()), verify=verify_all, force=force, dry_run=dry_run)

    async def work(report_progress: adopt.Progress) -> adopt.AdoptReport:
        async with _open_archive() as archive, held(archive.conn, Lock.NIGHTLY, wait=False):
            return await adopt.adopt(
                archive.conn,
                archive.store,
                archive.spool,
                clock.system_now(),
                options=options,
                progress=report_progress,
            )

    with progress.shown("Adopting") as show:
        report = cli.run(work(show))
    if as_json:
        cli.show({"dry_run": dry_run, **asdict(report)})
    else:
        for verdict in ("adopted", "superseded", "present", "conflicts", "refused"):
            for manifest in getattr(report, verdict):
                reason = f": {manifest['reason']}" if manifest.get("reason") else ""
                typer.echo(f"{verdict:10}  {manifest.get('day', ''):10}  {manifest['url']}{reason}")
        typer.echo(
            f"{len(report.adopted)} adopted, {report.known} known, {len(report.superseded)} superseded, "
            f"{len(report.present)} of days in the database, {len(report.conflicts)} conflicts, "
            f"{len(report.refused)} refused" + (" (dry run)." if dry_run else ".")
        )
    raise typer.Exit(0 if report.is_clean else cli.EXIT_FAILED)


@_commands.command(
    name="get",
    help="Print one device's heartbeats of an archived day, oldest first, as CSV or JSON, without restoring the day.",
)
def get_device(
    device: Annotated[str, typer.Option(help="device_id")],
    day: Annotated[datetime, typer.Option(formats=["%Y-%m-%d", "%Y%m%d"], help="A UTC day: 2026-11-24.")],
    as_json: cli.Json = False,
) -> None:

    async def work() -> list[dict[str, str | None]]:
        async with _open_archive() as archive:
            archives = await catalog.find(archive.conn, day.date())
            return await get.heartbeats_of(archive.store, archives, device, archive.spool)

    with _spinner("Reading …"):
        rows = cli.run(work())
    if as_json:
        cli.show({"device_id": device, "day": day.date(), "heartbeats": rows})
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
