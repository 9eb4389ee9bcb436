"""Fill pipes, as a writer does that is faster than its reader."""

from __future__ import annotations

import os


def fill(descriptor: int) -> None:
    """Fill a pipe completely."""
    os.set_blocking(descriptor, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(descriptor, b"-" * size)
        except BlockingIOError:
            continue
