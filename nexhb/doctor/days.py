"""Checks of the days: their tables, their archives, and the space for more of them."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from nexhb import disk, partitions
from nexhb.archive import adopt, marker
from nexhb.archive.opening import open_store
from nexhb.doctor.check import CheckContext, CheckResult, shown_time
from nexhb.jobs.runner import MAX_CLOCK_DIFFERENCE
from nexhb.postgres import sql

_Q = sql.queries("doctor")

MAX_LATE_AGE = timedelta(days=2)  # the nightly run moves late heartbeats to the archive
MAX_DRILL_AGE = timedelta(days=8)
MAX_STORE_NAMES, STORE_TIMEOUT_S = 20_000, 20  # the archive store's check: how many names it lists, its timeout
MIN_DAYS_AHEAD = 3
MIN_DISK_DAYS = 7


async def days_ahead(context: CheckContext) -> CheckResult:
    """Check that enough days have their partition."""
    ahead = await partitions.days_ahead(context.conn, context.now.date())
    required = min(MIN_DAYS_AHEAD, context.settings.partitions.days_ahead)
    # A dry run first: the real run would archive a day that somebody detached.
    remedy = "nexhb nightly --dry-run, and docs/runbook.md#nexhbdaysaheadmissing"
    detail = f"{max(ahead, 0)} days without a gap"
    if ahead < required:
        gap = context.now.date() + timedelta(days=ahead + 1)
        detail += f", then {gap} is {await partitions.reason_not_to_create(context.conn, gap) or 'missing'}"
    return CheckResult("days ahead", ahead >= required, detail, remedy)


async def pending_detaches(context: CheckContext) -> CheckResult:
    """Check that every detach could be finished."""
    if default := await partitions.default_partition(context.conn):
        remedy = f"ALTER TABLE {partitions.PARENT} DETACH PARTITION {partitions.quoted(default)}, and docs/runbook.md"
        return CheckResult("detaches", False, f"the DEFAULT partition {default} prevents every detach", remedy)
    names = [p.name for p in await partitions.attached(context.conn) if p.detach_pending]
    detail = f"pending: {', '.join(names)}" if names else "none is pending"
    return CheckResult("detaches", not names, detail, "nexhb nightly, once no long query reads device_heartbeats")


async def old_days(context: CheckContext) -> CheckResult:
    """Check that days older than the retention are archived and dropped."""
    kept = context.now.date() - timedelta(days=context.settings.partitions.retention_days + 1)
    rows = await partitions.recorded(context.conn)
    old = [r for r in rows if r["present"] and not r["restored_at"] and r["range_end"].date() <= kept]
    failed = await context.conn.fetch(_Q["failed_days"])
    if failed:
        detail = f"{len(failed)} days could not be archived; {failed[0]['partition_name']}: {failed[0]['reason']}"
        return CheckResult("archive", False, detail, "remove the cause, then run nexhb nightly")
    return CheckResult("archive", not old, f"{len(old)} days are older than the retention", "nexhb nightly")


async def archive_store(context: CheckContext) -> CheckResult:
    """Compare the names of the first objects with the catalog; the check reads no object but the marker."""
    settings = context.settings
    async with asyncio.timeout(STORE_TIMEOUT_S), open_store(settings.archive_url, settings.archive) as store:
        if not await marker.is_expected_store(context.conn, store):
            return CheckResult(
                "archive store", False, f"{marker.location_of(store)} lacks the marker that this database knows",
                "mount it, or correct archive.url; if the store was moved: nexhb archive adopt",
            )  # fmt: skip
        differences = await adopt.differences(context.conn, store, MAX_STORE_NAMES)
    scope = (
        f"of its first {differences.objects_listed:,} objects, "
        if differences.objects_listed == MAX_STORE_NAMES
        else ""
    )
    problems = [
        f"{scope}{len(names)} {problem}, {names[0]} first"
        for problem, names in (
            ("archives belong to days that are missing from the catalog", differences.unknown_days),
            ("differ from the catalog's archive of the same day", differences.rivals),
        )
        if names
    ]
    detail = "; ".join(problems) or f"{scope}all archives are in the catalog"
    return CheckResult("archive store", not problems, detail, "nexhb archive adopt --dry-run")


async def late_heartbeats(context: CheckContext) -> CheckResult:
    """Check that late heartbeats are moved to their days."""
    row = await context.conn.fetchrow(_Q["late"])
    assert row is not None  # noqa: S101 - an aggregate has one row
    old = row["since"] is not None and abs(context.now - row["since"]) > MAX_LATE_AGE
    return CheckResult("late heartbeats", not old, f"{row['rows']} wait for the nightly run", "nexhb nightly")


async def restore_drill(context: CheckContext) -> CheckResult:
    """Check that an archive was read back recently."""
    row = await context.conn.fetchrow(_Q["drills"], context.now + MAX_CLOCK_DIFFERENCE)
    assert row is not None  # noqa: S101 - an aggregate has one row
    if not row["archives"]:
        return CheckResult("restore drill", True, "nothing is archived yet")
    good = row["drilled_at"] is not None and context.now - row["drilled_at"] <= MAX_DRILL_AGE
    return CheckResult(
        "restore drill", good, f"last successful drill {shown_time(row['drilled_at'])}", "nexhb archive verify --all"
    )


async def disk_space(context: CheckContext) -> CheckResult:
    """Check the space for further days, or for spooled archives."""
    settings = context.settings.database
    try:
        space = disk.free_space(context.settings.data_dir)
    except OSError as error:
        if settings.url is None:
            raise
        return CheckResult("disk", True, f"the disk of database.url is not visible from here; {error}")
    shortage = space.shortage(
        reserve_bytes=settings.disk_reserve_bytes, reserve_inodes=settings.disk_reserve_inodes, held=False
    )
    if settings.url is not None and shortage is None:
        return CheckResult("disk", True, "the disk of database.url is not visible from here; data_dir has enough space")
    if settings.url is not None:
        free = f"{space.free_bytes >> 20} MiB and {space.free_inodes} inodes are free"
        detail = f"data_dir, where archives are spooled: {free}"
        return CheckResult("disk", False, detail, "free space, or move data_dir")
    if shortage is not None:
        return CheckResult("disk", False, shortage.detail, shortage.remedy)
    day = await context.conn.fetchval(_Q["day_bytes"], partitions.midnight(context.now.date())) or 0
    left = space.free_bytes / day if day else float("inf")
    good = left >= MIN_DISK_DAYS
    days = f", {left:,.0f} days at the current rate" if day else ""
    return CheckResult(
        "disk", good, f"{space.free_bytes >> 30} GiB are free{days}", "free space, or shorten partitions.retention_days"
    )
