"""A task that was cancelled in the very turn in which a notice reached it went on, and the stop waited for it for ever:
asyncio.wait_for swallows such a cancellation (Python 3.11). Seen once in some hundred tests, where a device was added
just before its daemon stopped; under systemd it would have been killed after its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb.config import Reads, Settings
from nexhb.daemon import utc_now
from nexhb.db import Database
from nexhb.devices import DeviceStore
from nexhb.flags import FlagStore, first_values
from nexhb.perfdiff import PerfDiff
from nexhb.reads import Offline

TURNS = 4  # between the notice and the cancellation


async def devices_store(database: Database, _: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """What follows the tokens, and a notice to it."""
    store = DeviceStore(database, refresh_s=60)
    return asyncio.create_task(store.run()), lambda: store._changed.put_nowait("")


async def flag_store(database: Database, _: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """What follows the flags."""
    store = FlagStore(database, first_values(Reads()), utc_now)
    return asyncio.create_task(store.run()), store._changed.set


async def comparisons(database: Database, folder: Path) -> tuple[asyncio.Task[None], Callable[[], object]]:
    """What compares reads."""
    settings = Settings(data_dir=folder, reads=Reads(perf_diff=True, perf_diff_percent=100))
    store = FlagStore(database, first_values(settings.reads), utc_now)
    await store.load()
    compares = PerfDiff(database, store, settings, utc_now)
    question = Offline(timedelta(minutes=10), 10)
    return asyncio.create_task(compares.run()), lambda: compares.offer(question)


@pytest.mark.parametrize("turns", range(TURNS))
@pytest.mark.parametrize("follows", [devices_store, flag_store, comparisons])
async def test_a_cancelled_task_ends_whatever_reaches_it_meanwhile(
    database: Database, tmp_path: Path, follows: Callable[..., object], turns: int
) -> None:
    task, notice = await follows(database, tmp_path)  # type: ignore[misc]
    await asyncio.sleep(0.2)  # it listens
    notice()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=10)
    assert done
    assert task.cancelled()
