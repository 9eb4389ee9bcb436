"""Formerly, a task that was cancelled in the turn of the event loop in which a notification reached it kept running,
and the stop waited for the task for ever: asyncio.wait_for swallows such a cancellation (Python 3.11). This happened
once in some hundred tests, when a device was added just before its daemon stopped; systemd would have killed the daemon
at its timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb.clock import system_now
from nexhb.config import ReadsSettings, Settings
from nexhb.devices.store import DeviceStore
from nexhb.postgres.connections import Database
from nexhb.reading.comparison import PerfDiff
from nexhb.reading.flags import FlagStore, first_values
from nexhb.reading.queries import OfflineQuery
from tests.conftest import SOON_S

TURNS = 4  # turns of the event loop between the notification and the cancellation


async def devices_store(database: Database, _: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """Start the task that follows the tokens; return it and a function that notifies it."""
    store = DeviceStore(database, refresh_s=60)
    return asyncio.create_task(store.run()), lambda: store._changed.put_nowait("")


async def flag_store(database: Database, _: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """Start the task that follows the flags; return it and a function that notifies it."""
    store = FlagStore(database, first_values(ReadsSettings()), system_now)
    return asyncio.create_task(store.run()), store._changed.set


async def comparisons(database: Database, folder: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """Start the task that compares reads; return it and a function that offers it a query."""
    settings = Settings(data_dir=folder, reads=ReadsSettings(perf_diff=True, perf_diff_percent=100))
    store = FlagStore(database, first_values(settings.reads), system_now)
    await store.load()
    perf_diff = PerfDiff(database, store, settings, system_now)
    query = OfflineQuery(timedelta(minutes=10), 10)
    return asyncio.create_task(perf_diff.run()), lambda: perf_diff.offer(query)


@pytest.mark.parametrize("turns", range(TURNS))
@pytest.mark.parametrize("follows", [devices_store, flag_store, comparisons])
async def test_a_cancelled_task_ends_even_if_a_notification_arrives_at_the_same_time(
    database: Database, tmp_path: Path, follows: Callable[..., object], turns: int
) -> None:
    task, notify = await follows(database, tmp_path)  # type: ignore[misc]
    await asyncio.sleep(0.2)  # until the task listens
    notify()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=SOON_S)
    assert done
    assert task.cancelled()
