"""nexhb import-legacy: import NexMDM's devices and history while both systems run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer

from nexhb import cli, clock
from nexhb.cli import backfill, progress
from nexhb.config import Settings
from nexhb.errors import BadInput
from nexhb.jobs import runner
from nexhb.jobs.backfill import MAX_DAYS
from nexhb.jobs.runner import Job, JobResult, JobRun
from nexhb.nexmdm import importing
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.deleted import DeletedDevices
from nexhb.nexmdm.importing import ImportResult, Options
from nexhb.nexmdm.source import FutureRows
from nexhb.nexmdm.zones import RepeatedHour
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock
from nexhb.texts import quoted

RATE = 10_000
MAX_NAMED = 20


@dataclass(frozen=True)
class _Arguments:
    """The command's options."""

    days: int | None
    rate: int
    timezone: str | None
    repeated_hour: RepeatedHour | None
    revoke_deleted: bool
    revoke_at_most: int | None


def _job(source: sources.NexmdmDatabase, options: Options, show: progress.Show, results: list[ImportResult]) -> Job:
    async def work(conn: Connection, now: datetime) -> JobResult:
        result = await importing.run(
            source, conn, now, options, lambda done, total, rate: show(done, total, f"{rate:,.0f}/s")
        )
        results.append(result)
        return JobResult(result.counts(), tuple(result.failures))

    return Job("import", Lock.IMPORT, "legacy_import", work)


async def _import(given: str | None, arguments: _Arguments) -> tuple[JobRun, ImportResult | None, JobRun | None]:
    settings = cli.settings()
    dsn = given or (settings.legacy.source.get_secret_value() if settings.legacy.source else None)
    if dsn is None:
        raise BadInput("no source is given.", hint="Set --source, $LEGACY_DATABASE_URL or legacy.source.")
    results: list[ImportResult] = []
    async with sources.opened(dsn, arguments.timezone) as source, cli.opened_database(settings) as database:
        with progress.shown("heartbeats") as show:
            job = _job(source, _options(settings, arguments), show, results)
            run = await runner.run(database, job, clock.system_now())
    if not results:
        return run, None, None
    with progress.shown("devices") as show:
        days = min(max((clock.system_now().date() - results[0].since).days + 1, 1), MAX_DAYS)
        return run, results[0], await backfill.run(days, show)


def _options(settings: Settings, arguments: _Arguments) -> Options:
    retention = settings.partitions.retention_days
    days = retention if arguments.days is None else arguments.days
    return Options(
        days, arguments.rate, retention, settings.ingest.bucket_seconds, arguments.repeated_hour,
        arguments.revoke_deleted, arguments.revoke_at_most,
    )  # fmt: skip


@cli.app.command(
    name="import-legacy",
    help="""
    Import devices, their tokens and their heartbeats from a NexMDM database while both systems run.

    An interrupted import continues where it stopped when it is run again; nothing is written twice. docs/moving.md
    describes the whole move, which begins with --days 0. Exit code 1 if the counts of both sides do not agree, 3 if
    another import is running.
    """,
)
def import_legacy(  # noqa: PLR0917 - typer reads each option from a parameter
    source: Annotated[
        str | None,
        typer.Option(
            envvar="LEGACY_DATABASE_URL",
            help="NexMDM's database (postgresql://…), which is only read. Prefer the variable; default: legacy.source.",
        ),
    ] = None,
    days: Annotated[
        int | None,
        typer.Option(min=0, max=3650, help="Today and this many days before; default: partitions.retention_days."),
    ] = None,
    rate: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="The maximum number of heartbeats a second; it protects ingest.")
    ] = RATE,
    source_timezone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="The time zone of NexMDM's times; default: that of its role and database."),
    ] = None,
    repeated_hour: Annotated[
        RepeatedHour | None,
        typer.Option(help="If the end of daylight saving time repeats an hour: which of the two its rows belong to."),
    ] = None,
    revoke_deleted: Annotated[
        bool, typer.Option("--revoke-deleted", help="Revoke devices that NexMDM has deleted since an earlier import.")
    ] = False,
    revoke_at_most: Annotated[
        int | None,
        typer.Option(
            min=1, help="The maximum number of devices to revoke; default: 10, or a tenth of all imported, if more."
        ),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    arguments = _Arguments(days, rate, source_timezone, repeated_hour, revoke_deleted, revoke_at_most)
    run, result, backfill_run = cli.run(_import(source, arguments))
    if as_json:
        more = result.shown() if result else {}
        cli.show(run.as_dict() | more | ({"backfill": backfill_run.as_dict()} if backfill_run else {}))
    else:
        _print_result(run, result)
        if backfill_run:
            backfill.print_result(backfill_run)
    codes = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}
    failed = backfill_run is not None and backfill_run.status == "failed"
    raise typer.Exit(cli.EXIT_FAILED if failed else codes.get(run.status, cli.EXIT_FAILED))


def _print_result(run: JobRun, result: ImportResult | None) -> None:
    typer.echo(f"import: {run.status}" + (f" ({run.reason})" if run.reason else ""))
    if result is None:
        if run.status == "failed":
            typer.echo("Committed rows are kept. Run the import again: it continues where it stopped.")
        return
    for line in _lines(result):
        typer.echo(line)


def _lines(result: ImportResult) -> Iterable[str]:
    of = result.devices
    yield f"times of the source: {result.zone.name} ({result.zone.set_by}); its newest heartbeat is {_newest(result)}"
    yield f"devices: {of.seen:,} in the source, {len(of.numbers):,} imported, {of.made:,} of them new here"
    yield f"  tokens added {of.tokens_added:,}; {of.hashes_waiting:,} more will be adopted with their first heartbeat"
    if of.renamed:
        yield f"  renamed {of.renamed:,}, to their present names in NexMDM"
    if of.tokens_revoked:
        yield f"  tokens revoked {of.tokens_revoked:,}"
    for reason, count in of.reasons.most_common():
        yield f"  not imported {count:,}: {reason}"
    for device_id, reason in of.rejected[:MAX_NAMED]:
        yield f"    {quoted(device_id)}: {reason}"
    yield from _deleted(result.deleted)
    yield f"heartbeats since {result.since}: read now {result.total('read_now'):,} in {result.seconds:.0f} s"
    yield f"  {'day':10}  {'source':>11} {'written':>11} {'now':>11} {'duplicates':>11} {'refused':>9} {'missing':>9}"
    for day in result.days:
        counts: tuple[Any, ...] = (day.source, day.written, day.written_now, day.deduplicated)
        verdict = day.rejected_because or ("" if day.agrees else "DOES NOT AGREE")
        numbers = " ".join(f"{count:>11,}" for count in counts)
        yield f"  {day.day}  {numbers} {day.rejected:>9,} {day.missing:>9,}  {verdict}".rstrip()
    if copies := result.total("copies"):
        yield f"  {copies:,} of the duplicates were sent to both systems; nexhb has the times at which they were made"
    if result.unknown_ids:
        yield f"  refused: rows of {len(result.unknown_ids):,} ids that NexMDM's devices table does not have"
    for column, count in (of.dropped + result.dropped).most_common():
        yield f"  stored as null because the value did not fit: {column}, {count:,} times"
    if result.older_left:
        yield f"  older rows were not imported: {result.older_left}"
    if result.future and result.future.rows:
        yield from _future(result)
    yield "BOTH SIDES DO NOT AGREE" if result.disagreements else "both sides agree"


def _deleted(deleted: DeletedDevices) -> Iterable[str]:
    if deleted.revoked:
        yield f"  revoked, since NexMDM has deleted them: {len(deleted.revoked):,}: {_named(deleted.revoked)}"
    if deleted.not_revoked_because:
        yield f"  NOT REVOKED: {deleted.not_revoked_because}"
    if deleted.alive:
        yield f"  deleted in NexMDM but not revoked here: {len(deleted.alive):,}: {_named(deleted.alive)}"
        yield "    `nexhb devices revoke ID` revokes one, `nexhb import-legacy --revoke-deleted` all of them"
    if deleted.own_token:
        yield f"    an import does not revoke these, which have a token from nexhb: {_named(deleted.own_token)}"


def _named(device_ids: list[str]) -> str:
    return ", ".join(map(quoted, device_ids[:MAX_NAMED])) + (", …" if len(device_ids) > MAX_NAMED else "")


def _newest(result: ImportResult) -> str:
    if result.newest is None:
        return "none"
    age = max(int((result.until - result.newest).total_seconds()), 0)
    return f"{result.newest:%Y-%m-%d %H:%M:%SZ}, {age // 3600} h {age % 3600 // 60} min before its clock"


def _future(result: ImportResult) -> Iterable[str]:
    rows, newest, clock = result.future or FutureRows(0, None, result.until)
    minutes = (newest - clock).total_seconds() / 60 if newest else 0
    yield f"  NOT IMPORTED: {rows:,} heartbeats are ahead of the source's clock, by up to {minutes:,.1f} minutes."
    yield f"    If its times are not {result.zone.name}, give --source-timezone."
    yield "    If NexMDM's own clock is ahead, run this again after that time."
