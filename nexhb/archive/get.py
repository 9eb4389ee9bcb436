"""One device's heartbeats out of a day's archives, without restoring the day."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.store import Store
from nexhb.errors import BadInput

MOST_ROWS = 100_000  # held in memory, some 150 MB: a day has 86,400 seconds

_TS = COLUMNS.index("ts")


async def heartbeats_of(
    store: Store, archives: Sequence[Archived], device_id: str, spool: Path | None = None
) -> list[dict[str, str | None]]:
    """Its rows, oldest first, as texts by column. Raises ArchiveDamaged or StoreError, and BadInput for more rows than
    MOST_ROWS: what is returned comes from archives that were read to their end and found whole."""
    found: list[list[str]] = []
    for archived in archives:
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        async with aclosing(verify.rows(store, manifest, ("device_id", {device_id}), spool)) as pieces:
            async for rows in pieces:
                found += rows
                if len(found) > MOST_ROWS:
                    raise BadInput(
                        f"{device_id} has more than {MOST_ROWS:,} rows there.",
                        hint="`nexhb archive restore --into TABLE` brings all of them into a table.",
                    )
    found.sort(key=lambda row: row[_TS])
    return [dict(zip(COLUMNS, (text or None for text in row), strict=True)) for row in found]
