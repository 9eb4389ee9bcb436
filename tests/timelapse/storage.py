"""Faults of the store: it rejects an object, returns wrong data, or loses data."""

from __future__ import annotations

from nexhb.archive import catalog
from nexhb.archive.manifest import decode
from nexhb.jobs.plan import NightlyRules
from tests.timelapse import jobs
from tests.timelapse.fault_kinds import FaultKind, has_day_to_archive, has_dropped_day, has_supplements
from tests.timelapse.jobs import TonightsPlan
from tests.timelapse.kills import RunNight
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.store import Fault, UnreliableStore, flipped
from tests.timelapse.world import World


def _fault(fault: Fault, kind: str) -> RunNight:
    async def run_night(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
        world.store.arm(fault, kind)
        done = await jobs.run(world, rules)
        happened = world.store.armed is None  # false if nothing was stored, as no late heartbeat is new
        world.store.arm(None, kind)
        if (done.status == "failed") != happened:
            raise BrokenPromise(f"The fault happened: {happened}; the run is {done.status}: {done.reason}")
        return happened

    return run_night


def _damage(store: UnreliableStore, manifest: str, *, of_manifest: bool, is_deleted: bool) -> None:
    path = store.folder / manifest
    if not of_manifest:
        path = store.folder / decode(path.read_bytes()).objects[-1].name
    if is_deleted:
        path.unlink()
    else:
        path.write_bytes(flipped(path.read_bytes(), 30))


def _damaged_before_drop(*, of_manifest: bool = False, is_deleted: bool = False) -> RunNight:
    """The archive was stored, verified and recorded, but is damaged when the next run is about to drop the table."""

    async def run_night(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
        world.store.last_put = ""
        if not await jobs.run_killed(world, rules, lambda at: at == "recorded" and "/day-" in world.store.last_put):
            return False
        [(name, url)] = await world.conn.fetch(
            """SELECT partition_name, archive_url FROM hb_partitions
               WHERE state = 'archived' ORDER BY archived_at DESC, range_start DESC LIMIT 1"""
        )
        _damage(world.store, world.store.name_of(url), of_manifest=of_manifest, is_deleted=is_deleted)
        await jobs.run_failing(world, rules)
        if not await world.conn.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
            raise BrokenPromise(f"{name} was dropped although its archive is damaged.")
        return True

    return run_night


async def _damaged_after_drop(world: World, rules: NightlyRules, tonight: TonightsPlan) -> bool:
    """An archive damaged after the drop can only be replaced from a copy. The drill, the nightly test restore of an
    archive, must report it."""
    archived = (await catalog.find(world.conn, world.rng.choice(tonight.dropped_days)))[0]
    manifest = world.store.folder / world.store.name_of(archived.url)
    path = world.store.folder / decode(manifest.read_bytes()).objects[-1].name
    intact = path.read_bytes()
    path.write_bytes(flipped(intact, 30))
    done = await jobs.run_failing(world, rules, jobs.DrillOf(archived.url))
    path.write_bytes(intact)
    if "drill" not in done.reason:
        raise BrokenPromise(
            f"The archive of {archived.partition} is damaged, but the drill did not report it: {done.reason}"
        )
    return True


KINDS = (
    *(FaultKind(fault, has_day_to_archive, _fault(fault, "day")) for fault in Fault),
    *(FaultKind(f"{fault}, of a supplement", has_supplements, _fault(fault, "late")) for fault in Fault),
    FaultKind("an object damaged before the drop", has_day_to_archive, _damaged_before_drop()),
    FaultKind("a manifest damaged before the drop", has_day_to_archive, _damaged_before_drop(of_manifest=True)),
    FaultKind("an object deleted before the drop", has_day_to_archive, _damaged_before_drop(is_deleted=True)),
    FaultKind("an object damaged after the drop", has_dropped_day, _damaged_after_drop),
)
