"""Run the daemon as a process: its signals, its service manager, its exit code."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from nexhb import __version__, log, notify
from nexhb.config import Settings
from nexhb.daemon import Running, running
from nexhb.errors import ConfigError, NexhbError, described
from nexhb.postgres.errors import FROM_THE_DATABASE

_log = log.get("daemon")

EXTENSION_S, EXTEND_EVERY_S = 30.0, 10.0  # by how much, and how often, a slow start extends systemd's timeout
# The total of the extensions: 300 s for the embedded PostgreSQL, 60 s for a database, the rest for migrations.
MAX_EXTENSION_S = 900.0


async def serve(settings: Settings, ready: Callable[[Running], None]) -> int:
    """Run the daemon until SIGTERM or SIGINT, which also end a start, and return the exit code. `ready` is called once
    the daemon accepts heartbeats."""
    log.capture_python_output()
    manager = notify.Notifier.from_environment(os.environ)
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        async with AsyncExitStack() as stack:
            starting = asyncio.ensure_future(stack.enter_async_context(running(settings, manager=manager)))
            await _wait_for_start(starting, stopped, manager)
            if not starting.done():
                manager.send(STOPPING=1)
                starting.cancel()
                await asyncio.wait((starting,))
                return 0
            daemon = starting.result()
            _log.info(
                "daemon.started", version=__version__, url=daemon.url, instance_url=daemon.instance_url,
                host=socket.gethostname(),
            )  # fmt: skip
            ready(daemon)
            manager.send(READY=1, STATUS=daemon.status())
            daemon.tasks.start("reload", _keep_reloading(reload, daemon.renew_tls, manager, daemon.status))
            gc.freeze()  # the objects that exist now live until the end
            # At the default (one collection per 700 objects) the collector used 4 % of a full core, and freed nothing.
            gc.set_threshold(20_000, 20, 50)
            await asyncio.wait((stopped, daemon.tasks.failed), return_when=asyncio.FIRST_COMPLETED)
            _log.info("daemon.stopping")
            manager.send(STOPPING=1, STATUS="Stopping.")
    except NexhbError as error:
        _log.error("daemon.not_started", error=str(error))
        manager.send(STATUS=f"Not started: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except FROM_THE_DATABASE as error:
        # The database went away during the start; the service manager starts the daemon again.
        _log.error("daemon.not_started", error=described(error))
        manager.send(STATUS="Not started: the database went away.")
        return 1
    finally:
        stopped.cancel()
    if daemon.tasks.failed.done():
        _log.error("daemon.part_died", exc_info=daemon.tasks.failed.result())
        return 1
    _log.info("daemon.stopped")
    return 0


async def _wait_for_start(
    starting: asyncio.Future[Any], stopped: asyncio.Future[Any], manager: notify.Notifier
) -> None:
    """Wait until the daemon has started or must stop. Meanwhile, extend the service manager's timeout: crash recovery,
    a migration or an unreachable database slow a start down."""
    until_s = time.monotonic() + MAX_EXTENSION_S
    waiting: set[asyncio.Future[Any]] = {starting, stopped}
    while len(waiting) == 2 and time.monotonic() < until_s:
        manager.extend_timeout(EXTENSION_S)
        _, waiting = await asyncio.wait(waiting, timeout=EXTEND_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
    if len(waiting) == 2:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


async def _keep_reloading(
    requested: asyncio.Event, renew: Callable[[], object], manager: notify.Notifier, status: Callable[[], str]
) -> None:
    """Call `renew` on each SIGHUP, also on one received during the start. Never returns."""
    while True:
        await requested.wait()
        requested.clear()
        manager.reloading()
        renew()
        manager.send(READY=1, STATUS=status())
