"""Look after a running daemon: its side tasks, the service manager with its watchdog, requests that take too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Any

from nexhb import log, metrics, notify
from nexhb.config import Settings
from nexhb.http.transport import tls
from nexhb.http.transport.connections import Connections
from nexhb.ingest.intake import Intake
from nexhb.ingest.writer import Writer
from nexhb.readiness import Readiness, Source

_log = log.get("daemon")

SWEEP_S = 0.5
STATUS_S = 5.0  # how often to send the status to the service manager, unless its watchdog needs it more often


class SideTasks:
    """The tasks that run beside the requests, until the end of `stack`. If one ends by itself, `failed` is resolved and
    the daemon stops: half a daemon is worse than none."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task. When the stack closes, the task is cancelled and awaited before any part stops that entered the
        stack earlier."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._stack.push_async_callback(_cancel, task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.failed.done():
            self.failed.set_result(task.exception() or RuntimeError(f"the task {task.get_name()} ended"))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def notify_manager(
    manager: notify.Notifier, writer: Writer, readiness: Readiness, status: Callable[[], str]
) -> None:
    """Send the service manager the status and, while the writer makes progress, WATCHDOG=1. Never returns."""
    # Consecutive checks without progress. One check is not enough, because the process may just have been suspended.
    silent = 0
    while True:
        await asyncio.sleep(min(STATUS_S, (manager.watchdog_s or 3600.0) / 3))
        silent = silent + 1 if writer.is_silent else 0
        hangs = silent > 1
        readiness.set(Source.STALL, "The writer hangs." if hangs else "")
        if silent == 2:
            _log.error("writer.hangs", silent_s=round(writer.silent_s), where=_await_chain("writer"))
        feed = {} if hangs or manager.watchdog_s is None else {"WATCHDOG": 1}
        manager.send(**feed, STATUS=status())


def _await_chain(task_name: str) -> list[str]:
    """Return the coroutines in which a task waits, the outermost first."""
    chain: list[str] = []
    task = next((task for task in asyncio.all_tasks() if task.get_name() == task_name), None)
    coroutine: Any = task and task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        chain.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else type(coroutine).__name__)
        coroutine = getattr(coroutine, "cr_await", None)
    return chain


def status_line(readiness: Readiness, intake: Intake, writer: Writer, certificate: tls.Certificate) -> str:
    """Return the status in one line, for `systemctl status`."""
    reasons = " ".join(readiness.reasons(in_full=True))
    committed = (
        f"{datetime.fromtimestamp(writer.committed_at, UTC):%Y-%m-%d %H:%M:%S} UTC" if writer.committed_at else "none"
    )
    fields = [f"NOT READY: {reasons}" if reasons else "ready", f"queue {intake.items}", f"last commit {committed}"]
    return "; ".join([*fields, certificate.trouble] if certificate.trouble else fields)


async def sweep(settings: Settings, intake: Intake, connections: Connections) -> None:
    """Twice a second, answer heartbeats that have waited too long, and close connections whose requests take too
    long."""
    loop = asyncio.get_running_loop()
    lost = 0
    while True:
        due = loop.time() + SWEEP_S
        await asyncio.sleep(SWEEP_S)
        try:
            metrics.loop_lag.observe(max(0.0, loop.time() - due))
            intake.expire(loop.time(), settings.ingest.answer_within_seconds)
            intake.observe()
            metrics.log_lines_lost.inc(log.lines_lost() - lost)
            lost = log.lines_lost()
            connections.sweep(loop.time())
        except MemoryError:
            _log.error("sweep.no_memory")  # the next sweep is half a second later
