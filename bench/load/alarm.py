"""A clock that wakes the generator in time: whatever it oversleeps would count as the server's."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import time


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Sleeps until an instant of the monotonic clock.

    uvloop's timers round to whole milliseconds, up or down: up to half a millisecond of the generator's own
    in every latency. A timerfd in the event loop wakes within 0.1 ms (measured: median 0.045, p99 0.08).
    """

    def __init__(self) -> None:
        """Open the timer; without timerfd (not Linux) the loop's own timer serves."""
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        try:
            self._libc = ctypes.CDLL(None, use_errno=True)
            # CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC
            self._fd: int = self._libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, AttributeError):
            self._fd = -1
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ring)

    async def until(self, at_s: float) -> None:
        """Sleep until `time.monotonic()` is `at_s`."""
        if self._fd < 0:
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            return
        fraction, whole = math.modf(at_s)
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(int(whole), int(fraction * 1e9)))
        self._woken = self._loop.create_future()
        self._libc.timerfd_settime(self._fd, 1, ctypes.byref(spec), None)
        await self._woken

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def close(self) -> None:
        """Close the timer."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
