"""Simulate day after day and the last night, then check everything."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from tests.timelapse import jobs, late, nights
from tests.timelapse.checks import Check, checks
from tests.timelapse.fault_kinds import FaultPicker
from tests.timelapse.fleet import Device
from tests.timelapse.ledger import BrokenPromise, key_of, row_of
from tests.timelapse.world import NIGHT, START, Settings, World, living


async def live(settings: Settings, dsn: str, folder: Path, show: Callable[[World], None]) -> tuple[World, list[Check]]:
    """Run the whole time-lapse. `dsn` leads to a database with the schema and no rows; `show` is called every night.

    Raises BrokenPromise, with the command that reproduces it."""
    async with living(settings, dsn, folder) as world:
        world.store.meanwhile = lambda name: late.during_a_put(world, name)
        before = late.by_reason()
        try:
            await _days(world, show)
            world.faults.update(
                {f"late heartbeat, its day is {why}": n - before[why] for why, n in late.by_reason().items()}
            )
            return world, await checks(world)
        except (Exception, BrokenPromise) as error:
            when = f"day {(world.now - START).days} ({world.now:%Y-%m-%d %H:%M})"
            during = f", “{world.current_fault}”" if world.current_fault else ""
            raise BrokenPromise(f"Seed {settings.seed}, {when}{during}: {error or type(error).__name__}") from error


async def _days(world: World, show: Callable[[World], None]) -> None:
    settings, hour = world.settings, START
    picker = FaultPicker(nights.KINDS, random.Random(world.rng.random()))
    while True:
        world.now = hour
        if hour == settings.end - timedelta(days=2):
            await nights.restore_days_archived_early(world)
        if hour - NIGHT == hour.replace(hour=0) and hour >= world.paused_until:
            show(world)
            await nights.night(world, picker)
        if hour == settings.end:
            return
        await _hour(world, hour, hour + settings.step)
        hour += settings.step


async def _hour(world: World, start: datetime, end: datetime) -> None:
    world.now = end
    await _disturb_writer(world)
    for device in world.fleet.devices:
        if device.silent and start <= device.silent[1] < end:
            await _check_inactive(world, device)
    await world.ingest.send(world.fleet.hour(start, end))
    if end < world.paused_until:
        return
    if world.rng.random() < 0.02:
        await _damage_status(world)
    await jobs.reconcile(world)


async def _disturb_writer(world: World) -> None:
    chance = world.rng.random()
    if chance < 0.02:
        world.faults["daemon restarted"] += 1
        await world.ingest.restart()
    elif chance < 0.03:
        world.faults["backend of the writer terminated"] += 1
        await world.conn.execute(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'nexhb writer'"""
        )


async def _check_inactive(world: World, device: Device) -> None:
    status = await world.conn.fetchval("SELECT status FROM device_last_status WHERE device_no = $1", device.number)
    if status != "inactive":
        raise BrokenPromise(f"{device.id} was silent for longer than the retention, and its status is {status}.")
    world.faults["a device silent for longer than the retention"] += 1


async def _damage_status(world: World) -> None:
    """Delete a status, or make it older than the history; the reconciliation must repair it."""
    newest = world.rng.choice(list(world.ledger.newest.values()))
    row = row_of(newest)
    if world.now - newest.ts > timedelta(hours=20) or row not in world.ledger.rows[key_of(row)][:1]:
        return  # the status is too old for the reconciliation, or was set by a duplicate that is not in the history
    world.faults["a status row lost or set back"] += 1
    await world.conn.execute(
        world.rng.choice(
            (
                "DELETE FROM device_last_status WHERE device_no = $1",
                "UPDATE device_last_status SET last_ts = last_ts - interval '2 days' WHERE device_no = $1",
            )
        ),
        newest.device_no,
    )
