"""The monthly partitions of device_days: create them ahead of time, drop them after the retention."""

from __future__ import annotations

from datetime import date, timedelta

from nexhb import log
from nexhb.partitions import ddl, quoted, retry_while_locked
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("device_days")
_log = log.get("uptime")

PARENT = "device_days"


def month_of(day: date) -> date:
    """Return the first day of the day's month."""
    return day.replace(day=1)


def after(month: date) -> date:
    """Return the first day of the next month."""
    return month_of(month + timedelta(days=31))


def table_name(month: date) -> str:
    """Return the name of a month's table."""
    return f"{PARENT}_{month:%Y%m}"


async def ensure(conn: Connection, day: date) -> None:
    """Create the partition of the day's month if it is missing."""
    month = month_of(day)
    if not await conn.fetchval(_Q["has_month"], table_name(month)):
        await retry_while_locked(_create, conn, month)
        _log.info("device_days.month_created", partition=table_name(month))


async def _create(conn: Connection, month: date) -> None:
    async with ddl(conn):
        await conn.execute(
            f"CREATE TABLE IF NOT EXISTS {quoted(table_name(month))} PARTITION OF {PARENT} "
            f"FOR VALUES FROM ('{month}') TO ('{after(month)}')"
        )


async def keep(conn: Connection, today: date, retention_days: int) -> None:
    """Create the partitions of this month and the next, and drop those whose last day is older than the retention."""
    for month in (today, after(today)):
        await ensure(conn, month)
    oldest = today - timedelta(days=retention_days)
    names = [row["name"] for row in await conn.fetch(_Q["months_before"], table_name(month_of(oldest)))]
    for name in names:
        await retry_while_locked(_drop, conn, name)
        _log.info("device_days.month_dropped", partition=name)
    await conn.execute(_Q["forget_made"], month_of(oldest))


async def _drop(conn: Connection, name: str) -> None:
    async with ddl(conn):
        await conn.execute(f"DROP TABLE {quoted(name)}")
