"""Read one device's heartbeats from a day's archives, without restoring the day."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.store import Store
from nexhb.errors import BadInput

MAX_ROWS = 100_000  # limit of rows held in memory (150 MB); a device with a row every second has 86,400 a day

_TS = COLUMNS.index("ts")


async def heartbeats_of(
    store: Store, archives: Sequence[Archived], device_id: str, spool: Path | None = None
) -> list[dict[str, str | None]]:
    """Return the device's rows, oldest first, as texts by column. All archives are read to their end and verified.

    Raises ArchiveDamaged or StoreError, and BadInput if the device has more than MAX_ROWS rows.
    """
    heartbeats: list[list[str]] = []
    for archived in archives:
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        async with aclosing(verify.rows(store, manifest, ("device_id", {device_id}), spool)) as pieces:
            async for rows in pieces:
                heartbeats += rows
                if len(heartbeats) > MAX_ROWS:
                    raise BadInput(
                        f"{device_id} has more than {MAX_ROWS:,} rows on that day.",
                        hint="`nexhb archive restore --into TABLE` restores all of them into a table.",
                    )
    heartbeats.sort(key=lambda row: row[_TS])
    return [dict(zip(COLUMNS, (text or None for text in row), strict=True)) for row in heartbeats]
