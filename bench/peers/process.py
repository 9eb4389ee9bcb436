"""Run a peer in a process of its own."""

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
from bench.process import free_port

_START_S: Final = 20.0


class Server(NamedTuple):
    """The URL and the process id of a server."""

    url: str
    pid: int


@contextlib.contextmanager
def running(module: str, *words: str) -> Iterator[Server]:
    """Run `python -m bench.peers.MODULE --port … WORDS` until the block ends."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", f"bench.peers.{module}", "--port", str(port), *words],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if child.poll() is not None or time.monotonic() > deadline:
                raise stack.StackError(f"the peer {module} did not start")
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port}", child.pid)
    finally:
        # the peer stores nothing that would need an orderly end
        child.kill()
        child.wait()
