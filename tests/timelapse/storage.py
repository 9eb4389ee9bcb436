"""Storage that refuses, lies, or rots."""

from __future__ import annotations

from nexhb.archive import catalog
from nexhb.archive.manifest import decode
from nexhb.jobs.plan import Rules
from tests.timelapse import jobs
from tests.timelapse.cards import Card, archives, some_dropped, supplements
from tests.timelapse.jobs import Sight
from tests.timelapse.kills import Play
from tests.timelapse.ledger import Broken
from tests.timelapse.store import Fault, UnreliableStore, flipped
from tests.timelapse.world import World


def _fault(fault: Fault, kind: str) -> Play:
    async def play(world: World, rules: Rules, _sight: Sight) -> bool:
        world.store.arm(fault, kind)
        done = await jobs.run(world, rules)
        hit = world.store.armed is None  # no late heartbeat may be new: then nothing is stored
        world.store.arm(None, kind)
        if (done.status == "failed") != hit:
            raise Broken(f"The storage failed: {hit}; the run {done.status}: {done.reason}")
        return hit

    return play


def _rot(store: UnreliableStore, manifest: str, *, of_manifest: bool, vanishes: bool) -> None:
    path = store.folder / manifest
    if not of_manifest:
        path = store.folder / decode(path.read_bytes()).objects[-1].name
    if vanishes:
        path.unlink()
    else:
        path.write_bytes(flipped(path.read_bytes(), 30))


def _rots_at_rest(*, of_manifest: bool = False, vanishes: bool = False) -> Play:
    """Stored, read back and written down; and when the next run is to drop the table, it is not there any more."""

    async def play(world: World, rules: Rules, _sight: Sight) -> bool:
        world.store.last_put = ""
        if not await jobs.run_killed(world, rules, lambda at: at == "recorded" and "/day-" in world.store.last_put):
            return False
        [(name, url)] = await world.conn.fetch(
            """SELECT partition_name, archive_url FROM hb_partitions
               WHERE state = 'archived' ORDER BY archived_at DESC, range_start DESC LIMIT 1"""
        )
        _rot(world.store, world.store.name_of(url), of_manifest=of_manifest, vanishes=vanishes)
        await jobs.run_badly(world, rules)
        if not await world.conn.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
            raise Broken(f"{name} was dropped, and its archive has rotted.")
        return True

    return play


async def _drill_finds_rot(world: World, rules: Rules, sight: Sight) -> bool:
    """What rots behind the drop nobody can mend but from a copy; the drill must say so."""
    archived = (await catalog.find(world.conn, world.rng.choice(sight.dropped)))[0]
    manifest = world.store.folder / world.store.name_of(archived.url)
    path = world.store.folder / decode(manifest.read_bytes()).objects[-1].name
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, 30))
    done = await jobs.run_badly(world, rules, jobs.Drills(archived.url))
    path.write_bytes(whole)
    if "drill" not in done.reason:
        raise Broken(f"{archived.partition} has rotted, and its drill went well: {done.reason}")
    return True


CARDS = (
    *(Card(fault, archives, _fault(fault, "day")) for fault in Fault),
    *(Card(f"{fault}, of a supplement", supplements, _fault(fault, "late")) for fault in Fault),
    Card("an object rotted before the drop", archives, _rots_at_rest()),
    Card("a manifest rotted before the drop", archives, _rots_at_rest(of_manifest=True)),
    Card("an object vanished before the drop", archives, _rots_at_rest(vanishes=True)),
    Card("rot behind the drop, found by the drill", some_dropped, _drill_finds_rot),
)
