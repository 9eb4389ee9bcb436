"""A peer as a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from bench import stack

_START_S: Final = 20.0
_STOP_S: Final = 10.0


class Server(NamedTuple):
    """Where it listens, and who it is."""

    url: str
    pid: int


@contextlib.contextmanager
def running(module: str, *words: str) -> Iterator[Server]:
    """`python -m bench.peers.MODULE --port … WORDS`, once it listens; ended with the block."""
    port = stack.free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", f"bench.peers.{module}", "--port", str(port), *words],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_S
        while not _listens(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise stack.StackError(f"the peer {module} did not start")
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port}", child.pid)
    finally:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(_STOP_S)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
