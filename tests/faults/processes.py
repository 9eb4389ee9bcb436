"""Wait for the exit of a process without polling."""

from __future__ import annotations

import asyncio
import os


async def wait_for_exit(pid: int) -> None:
    """Wait until the process has exited, whether or not it is a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    exited = loop.create_future()

    def on_exit() -> None:
        if not exited.done():
            exited.set_result(None)

    loop.add_reader(handle, on_exit)
    try:
        await exited
    finally:
        loop.remove_reader(handle)
        os.close(handle)
