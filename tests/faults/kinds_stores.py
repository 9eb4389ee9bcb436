"""An archive store that must not be used because it may not belong to this database: its marker is missing, belongs to
another database, or disappears during a nightly run."""

from __future__ import annotations

from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.kinds_tables import NIGHTLY_RUN_S, archive_days
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World

FIRST_RETENTION = {"NEXHB_PARTITIONS__RETENTION_DAYS": "2"}  # one day more, so that the second run has a day to archive
_INCARNATION = """
SELECT oid::text || left(pg_walfile_name(pg_current_wal_lsn()), 8) AS name  -- with the timeline
FROM pg_database WHERE datname = current_database()
"""
_MARKERS = "SELECT marker AS name FROM archive_markers"
_DAYS = "SELECT relname AS name FROM pg_class WHERE relkind = 'r' AND relname ~ '^device_heartbeats_[0-9]{8}$'"


async def _remove_marker(world: World, fault: Fault) -> None:
    """Archive days to the right store; then remove the store's marker, and start a run that has more days to archive.
    While the marker is missing, no object may be written to the store, and no day dropped."""
    await archive_days(world, NIGHTLY_RUN_S, **world.s3.environment | FIRST_RETENTION)
    incarnation = await _names(world, _INCARNATION)
    if not await _names(world, _MARKERS) & world.s3.markers:
        raise NotPossible("the store has no marker of this database yet")
    with world.s3.marker_removed(another=fault.dice < 0.3, later=fault.dice > 0.6) as removal:
        before = await _names(world, _DAYS)
        await archive_days(world, NIGHTLY_RUN_S, **world.s3.environment)
        after = await _names(world, _DAYS)
    if not removal or await _names(world, _INCARNATION) != incarnation:
        raise NotPossible("nothing was written, or another database has replaced this one")
    if removal.written:
        world.report("wrong", f"objects written to a store without its marker: {sorted(removal.written)}")
    if dropped := before - after:
        world.report("wrong", f"days dropped although their store has no marker: {sorted(dropped)}")


async def _names(world: World, query: str) -> set[str]:
    try:
        async with world.connection() as conn:
            return {row["name"] for row in await conn.fetch(query)}
    except UNREACHABLE as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error


MARKER_MISSING = "archive marker missing"
KINDS = (FaultKind(MARKER_MISSING, Lane.TABLES, (2.0, 3.0), _remove_marker),)
