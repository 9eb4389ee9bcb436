"""nexhb partitions: the days, as hb_partitions and the catalog have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import typer

from nexhb import cli
from nexhb import partitions as days
from nexhb.cli import tables


async def _known() -> list[dict[str, Any]]:
    async with cli.opened_connection(cli.settings(), application="nexhb partitions") as conn:
        return [dict(row) for row in await days.known(conn)]


@cli.app.command(help="List the partitions, newest first. Rows are those of the last nightly count.")
def partitions(as_json: cli.Json = False) -> None:
    rows = cli.run(_known())
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
    """How old the rows are: a day that still takes heartbeats is counted each night, and has had more since."""
    if last := max((each for each in counted_at if each is not None), default=None):
        return f"Rows as the nightly run counted them, last at {last:%Y-%m-%d %H:%MZ}; what came since is not in them."
    return "Rows are counted by the nightly run, which has counted none yet."
