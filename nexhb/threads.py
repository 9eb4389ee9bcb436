"""Run blocking calls in threads that the process does not wait for at its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a daemon thread: after a timeout or Ctrl-C the process ends without waiting for the thread. With
    asyncio.to_thread, the process would stay alive until `work` returns."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    result.set_running_or_notify_cancel()  # from now on the future cannot be cancelled, so set_result works
    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)
