"""A store that is not the one that the database knows: its marker is missing, another's, or goes while a run is at
work."""

from __future__ import annotations

from tests.faults.kinds_tables import SENDING_S, send_days_away
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

LONGER = {"NEXHB_PARTITIONS__RETENTION_DAYS": "2"}  # than what is sent away afterwards
_LIFE = """
SELECT oid::text || left(pg_walfile_name(pg_current_wal_lsn()), 8) AS name  -- and its timeline
FROM pg_database WHERE datname = current_database()
"""
_MARKERS = "SELECT marker AS name FROM archive_markers"
_DAYS = "SELECT relname AS name FROM pg_class WHERE relkind = 'r' AND relname ~ '^device_heartbeats_[0-9]{8}$'"


async def _another(world: World, fault: Fault) -> None:
    """The right store, and what is there by then; the marker goes, and a run has days to send away."""
    await send_days_away(world, SENDING_S, **world.bucket.environment | LONGER)
    life = await _names(world, _LIFE)
    if not await _names(world, _MARKERS) & world.bucket.markers:
        raise Unable("the database does not know its store yet")
    with world.bucket.unmarked(another=fault.dice < 0.3, later=fault.dice > 0.6) as removed:
        before = await _names(world, _DAYS)
        await send_days_away(world, SENDING_S, **world.bucket.environment)
        after = await _names(world, _DAYS)
    if not removed or await _names(world, _LIFE) != life:
        raise Unable("nothing was written, or the database was replaced by one that does not know its store")
    if removed.written:
        world.blame("wrong", f"written to a store without its marker: {sorted(removed.written)}")
    if gone := before - after:
        world.blame("wrong", f"days dropped while their store is without its marker: {sorted(gone)}")


async def _names(world: World, query: str) -> set[str]:
    try:
        async with world.connection() as conn:
            return {row["name"] for row in await conn.fetch(query)}
    except UNREACHABLE as error:
        raise Unable(f"{type(error).__name__}: {error}") from error


ANOTHER = "another store"
KINDS = (Kind(ANOTHER, "tables", (2.0, 3.0), _another),)
