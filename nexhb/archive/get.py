"""One device's heartbeats out of a day's archives, without restoring the day."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.store import Store

_TS = COLUMNS.index("ts")


async def heartbeats_of(store: Store, archives: Sequence[Archived], device_id: str) -> list[dict[str, str | None]]:
    """Its rows, oldest first, as texts by column. Raises ArchiveDamaged or StoreError: what is returned
    comes from archives that were read to their end and found whole."""
    found: list[list[str]] = []
    for archived in archives:
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        async with aclosing(verify.rows(store, manifest, ("device_id", {device_id}))) as pieces:
            async for rows in pieces:
                found += rows
    found.sort(key=lambda row: row[_TS])
    return [dict(zip(COLUMNS, (text or None for text in row), strict=True)) for row in found]
