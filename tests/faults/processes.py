"""Waiting for the end of a process, without looking again and again."""

from __future__ import annotations

import asyncio
import os


async def ended(pid: int) -> None:
    """Wait until the process has ended: a child of ours or not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = loop.create_future()

    def tell() -> None:
        if not gone.done():
            gone.set_result(None)

    loop.add_reader(handle, tell)
    try:
        await gone
    finally:
        loop.remove_reader(handle)
        os.close(handle)
