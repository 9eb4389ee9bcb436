"""Heartbeats for days that are archived, or being archived."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prometheus_client import REGISTRY

from tests.timelapse.fleet import WINDOW
from tests.timelapse.world import World

_REASONS = ("detached", "archived", "archive_failed", "dropped")


def by_reason() -> dict[str, int]:
    """Return the number of late heartbeats according to the metric."""
    name = "nexhb_late_heartbeats_total"
    return {why: round(REGISTRY.get_sample_value(name, {"reason": why}) or 0) for why in _REASONS}


async def send_late(world: World) -> None:
    """Send heartbeats for days that are archived, or half archived after a failed run, for the next run to handle."""
    rows = await world.conn.fetch(
        """SELECT range_start FROM hb_partitions p WHERE range_start > $1 AND NOT EXISTS
               (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(partition_name) AND NOT inhdetachpending)
           ORDER BY range_start""",
        world.now - WINDOW,
    )
    sent = [heartbeat for row in rows for heartbeat in world.fleet.late(world.now, 1, row["range_start"])]
    await world.ingest.send(sent + world.fleet.repeats(world.now, 2))


async def during_a_put(world: World, name: str) -> None:
    """Send heartbeats for the day that is being archived, which is sealed and exported but not dropped yet."""
    if not name.endswith(".json") and "-0000-" not in name:
        return  # not during other puts: their number differs between two runs with the same seed
    day = datetime.strptime(name.partition("/")[0][-8:], "%Y%m%d").replace(tzinfo=UTC)
    if world.now - day < WINDOW - timedelta(hours=3):
        world.faults["heartbeats for a day that is being archived"] += 1
        await world.ingest.send(world.fleet.late(world.now, 2, day) + world.fleet.repeats(world.now, 2))
