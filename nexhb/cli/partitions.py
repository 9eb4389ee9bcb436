"""nexhb partitions: list the days, as recorded in hb_partitions and in PostgreSQL's catalog."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import typer

from nexhb import cli
from nexhb import partitions as days
from nexhb.cli import tables


async def _recorded() -> list[dict[str, Any]]:
    async with cli.opened_connection(cli.settings(), application="nexhb partitions") as conn:
        return [dict(row) for row in await days.recorded(conn)]


@cli.app.command(help="List the partitions, newest first. Row counts are from the last nightly run.")
def partitions(as_json: cli.Json = False) -> None:
    rows = cli.run(_recorded())
    if as_json:
        cli.show({"partitions": rows})
        return
    tables.show(("day", "state", "rows", "MiB", "remark"), _cells(rows))
    typer.echo(_as_of(row["counted_at"] for row in rows))


def _cells(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        state = row["state"]
        if state != "dropped" and not row["present"]:
            state += ", but not there"
        elif state == "active" and not row["attached"]:
            state += ", but detached"
        counted = "" if row["row_count"] is None else f"{row['row_count']:,}"
        note = row["reason"] or ("restored" if row["restored_at"] else "")
        yield f"{row['range_start']:%Y-%m-%d}", state, counted, f"{(row['bytes_size'] or 0) / 2**20:.1f}", note


def _as_of(counted_at: Iterable[datetime | None]) -> str:
    """Say when the rows were counted: a day that still receives heartbeats has more rows than its nightly count."""
    if last := max((moment for moment in counted_at if moment is not None), default=None):
        return f"Rows as counted by the nightly run, last at {last:%Y-%m-%d %H:%MZ}; later heartbeats are not included."
    return "Rows are counted by the nightly run, which has not counted any yet."
