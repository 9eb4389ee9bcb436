"""nexhb import-legacy: NexMDM's devices and history, beside both systems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer

from nexhb import cli, daemon
from nexhb.cli import backfill, progress
from nexhb.config import Settings
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.jobs import runner
from nexhb.jobs.backfill import DAYS_MOST
from nexhb.jobs.runner import Done, Job, Run
from nexhb.legacy import importing
from nexhb.legacy import source as sources
from nexhb.legacy.deleted import Deleted
from nexhb.legacy.importing import Imported, Options
from nexhb.legacy.source import Ahead
from nexhb.legacy.zones import Repeated
from nexhb.locks import Lock
from nexhb.texts import quoted

RATE = 10_000
NAMED = 20


@dataclass(frozen=True)
class _Asked:
    """The command's options."""

    days: int | None
    rate: int
    timezone: str | None
    repeated_hour: Repeated | None
    revoke_deleted: bool
    revoke_at_most: int | None


def _job(source: sources.Source, options: Options, show: progress.Show, kept: list[Imported]) -> Job:
    async def work(conn: Connection, now: datetime) -> Done:
        found = await importing.run(
            source, conn, now, options, lambda done, total, rate: show(done, total, f"{rate:,.0f}/s")
        )
        kept.append(found)
        return Done(found.counts(), tuple(found.failures))

    return Job("import", Lock.IMPORT, "legacy_import", work)


async def _import(given: str | None, asked: _Asked) -> tuple[Run, Imported | None, Run | None]:
    settings = cli.settings()
    dsn = given or (settings.legacy.source.get_secret_value() if settings.legacy.source else None)
    if dsn is None:
        raise BadInput("no source is given.", hint="Set --source, $LEGACY_DATABASE_URL or legacy.source.")
    kept: list[Imported] = []
    async with sources.opened(dsn, asked.timezone) as source, cli.opened_database(settings) as database:
        with progress.shown("heartbeats") as show:
            job = _job(source, _options(settings, asked), show, kept)
            run = await runner.run(database, job, daemon.utc_now())
    if not kept:
        return run, None, None
    with progress.shown("devices") as show:
        reach = min(max((daemon.utc_now().date() - kept[0].since).days + 1, 1), DAYS_MOST)
        return run, kept[0], await backfill.run(reach, show)


def _options(settings: Settings, asked: _Asked) -> Options:
    retention = settings.partitions.retention_days
    days = retention if asked.days is None else asked.days
    return Options(
        days, asked.rate, retention, settings.ingest.bucket_seconds, asked.repeated_hour, asked.revoke_deleted,
        asked.revoke_at_most,
    )  # fmt: skip


@cli.app.command(
    name="import-legacy",
    help="""
    Take devices, their tokens and their heartbeats from a NexMDM database, while both systems serve.

    Interrupted, it goes on where it was when it is run again; what is there already is not written twice.
    docs/moving.md is the whole move, which begins with --days 0. Exit code 1 where the counts of both sides do not
    agree, 3 where another import is at work.
    """,
)
def import_legacy(  # noqa: PLR0917 - typer reads each option from a parameter
    source: Annotated[
        str | None,
        typer.Option(
            envvar="LEGACY_DATABASE_URL",
            help="NexMDM's database: postgresql://… Read only. Better in the environment; else legacy.source.",
        ),
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=0, max=3650, help="Today and so many days before; else partitions.retention_days.")
    ] = None,
    rate: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Heartbeats a second at most, so that ingest keeps its latency.")
    ] = RATE,
    source_timezone: Annotated[
        str | None,
        typer.Option(
            metavar="ZONE", help="In which NexMDM's sessions wrote its times; else as its role and database say."
        ),
    ] = None,
    repeated_hour: Annotated[
        Repeated | None,
        typer.Option(
            help="Of which pass rows are that are stamped in the hour which the end of daylight saving time repeats."
        ),
    ] = None,
    revoke_deleted: Annotated[
        bool, typer.Option("--revoke-deleted", help="Revoke devices that NexMDM has deleted since an earlier import.")
    ] = False,
    revoke_at_most: Annotated[
        int | None,
        typer.Option(min=1, help="So many of them at most; else 10, or a tenth of those that NexMDM gave."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    asked = _Asked(days, rate, source_timezone, repeated_hour, revoke_deleted, revoke_at_most)
    run, found, filled = cli.run(_import(source, asked))
    if as_json:
        more = found.shown() if found else {}
        cli.show(run.shown() | more | ({"backfill": filled.shown()} if filled else {}))
    else:
        _say(run, found)
        if filled:
            backfill.say(filled)
    codes = {"completed": 0, "skipped": cli.EXIT_LOCK_HELD}
    failed = filled is not None and filled.status == "failed"
    raise typer.Exit(cli.EXIT_FAILED if failed else codes.get(run.status, cli.EXIT_FAILED))


def _say(run: Run, found: Imported | None) -> None:
    typer.echo(f"import: {run.status}" + (f" ({run.reason})" if run.reason else ""))
    if found is None:
        if run.status == "failed":
            typer.echo("What is committed stays. Run it again: it goes on where it stopped.")
        return
    for line in _lines(found):
        typer.echo(line)


def _lines(found: Imported) -> Iterable[str]:
    of = found.devices
    yield f"times of the source: {found.zone.name} ({found.zone.said_by}); its newest heartbeat is {_newest(found)}"
    yield f"devices: {of.seen:,} in the source, {len(of.numbers):,} taken, {of.made:,} of them new here"
    yield f"  tokens added {of.tokens_added:,}; adopted with their first heartbeat will be {of.hashes_waiting:,} more"
    if of.renamed:
        yield f"  renamed {of.renamed:,}, as they are called there now"
    if of.tokens_revoked:
        yield f"  tokens revoked {of.tokens_revoked:,}"
    for reason, count in of.reasons.most_common():
        yield f"  not taken {count:,}: {reason}"
    for device_id, reason in of.refused[:NAMED]:
        yield f"    {quoted(device_id)}: {reason}"
    yield from _deleted(found.deleted)
    yield f"heartbeats since {found.since}: read now {found.total('read_now'):,} in {found.seconds:.0f} s"
    yield f"  {'day':10}  {'source':>11} {'written':>11} {'now':>11} {'duplicates':>11} {'refused':>9} {'missing':>9}"
    for day in found.days:
        counts: tuple[Any, ...] = (day.source, day.written, day.written_now, day.deduplicated)
        verdict = day.refused_because or ("" if day.agrees else "DOES NOT AGREE")
        numbers = " ".join(f"{count:>11,}" for count in counts)
        yield f"  {day.day}  {numbers} {day.refused:>9,} {day.missing:>9,}  {verdict}".rstrip()
    if copies := found.total("copies"):
        yield f"  of the duplicates, {copies:,} were sent to both: nexhb has them at the time when they were made"
    if found.strangers:
        yield f"  refused: rows of {len(found.strangers):,} ids that its devices table does not have"
    for column, count in (of.dropped + found.dropped).most_common():
        yield f"  stored as null, as it did not fit: {column}, {count:,} times"
    if found.older_left:
        yield f"  there are older rows, which were left: {found.older_left}"
    if found.ahead and found.ahead.rows:
        yield from _ahead(found)
    yield "BOTH SIDES DO NOT AGREE" if found.why_not else "both sides agree"


def _deleted(of: Deleted) -> Iterable[str]:
    if of.revoked:
        yield f"  revoked, as NexMDM has deleted them: {len(of.revoked):,}: {_named(of.revoked)}"
    if of.not_revoked_because:
        yield f"  NOT REVOKED: {of.not_revoked_because}"
    if of.alive:
        yield f"  deleted in NexMDM and alive here: {len(of.alive):,}: {_named(of.alive)}"
        yield "    `nexhb devices revoke ID` revokes one, `nexhb import-legacy --revoke-deleted` all of them"
    if of.own_token:
        yield f"    of these, have a token of nexhb's own, and are not revoked by an import: {_named(of.own_token)}"


def _named(device_ids: list[str]) -> str:
    return ", ".join(map(quoted, device_ids[:NAMED])) + (", …" if len(device_ids) > NAMED else "")


def _newest(found: Imported) -> str:
    if found.newest is None:
        return "none"
    age = max(int((found.until - found.newest).total_seconds()), 0)
    return f"{found.newest:%Y-%m-%d %H:%M:%SZ}, {age // 3600} h {age % 3600 // 60} min before its clock"


def _ahead(found: Imported) -> Iterable[str]:
    rows, newest, clock = found.ahead or Ahead(0, None, found.until)
    minutes = (newest - clock).total_seconds() / 60 if newest else 0
    yield f"  NOT TAKEN: {rows:,} heartbeats that lie ahead of the source's clock, by {minutes:,.1f} minutes at most."
    yield f"    If its times are not {found.zone.name}, give --source-timezone."
    yield "    If NexMDM's own clock is ahead, run this again once they are past."
