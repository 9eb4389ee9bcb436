"""Hosts on one machine: network namespaces, each joined to the first by a cable of its own (veth).

Whatever is to happen on a host happens in a thread that has entered its namespace: sockets belong to the namespace that
their thread was in, so that the load there goes to a loopback address of that host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from bench.stack import Stack

_T = TypeVar("_T")
_NEWNET: Final = 0x4000_0000
_NET: Final = "10.213"


class Host(NamedTuple):
    """A namespace, and the address at which it reaches the first host."""

    name: str
    gateway: str

    def do(self, work: Callable[[], _T]) -> _T:
        """Run `work` there, and wait for it. Raises what it raises."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._there, work).result()

    def _there(self, work: Callable[[], _T]) -> _T:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self.name).open("rb") as namespace:
            if libc.setns(namespace.fileno(), _NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {self.name}")
        return work()


def lacking() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"nxb{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if tried.returncode != 0:
        return f"no network namespaces here: {tried.stderr.decode().strip()}"
    _ip("netns", "del", name)
    return ""


@contextlib.contextmanager
def made(number: int) -> Iterator[tuple[Host, ...]]:
    """So many hosts, gone with the block."""
    found: list[Host] = []
    try:
        for at in range(1, number + 1):
            # so that two runs on one machine are not in each other's way
            name, net = f"nxb{os.getpid()}-{at}", f"{_NET}.{(os.getpid() + at) % 256}"
            host = Host(name, f"{net}.1")
            _ip("netns", "add", name)
            found.append(host)
            ours, theirs = f"nxa{os.getpid()}-{at}", "nxb"
            _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
            _ip("addr", "add", f"{host.gateway}/30", "dev", ours)
            _ip("link", "set", ours, "up")
            for words in (
                ("addr", "add", f"{net}.2/30", "dev", theirs),
                ("link", "set", theirs, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", name, *words)
        yield tuple(found)
    finally:
        for host in found:
            # its end of the cable goes with it, and so the other end
            _ip("netns", "del", host.name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class StackThere(Stack):
    """A daemon on another host."""

    def __init__(self, folder: Path, settings: dict[str, str], host: Host) -> None:
        super().__init__(folder, settings)
        self._host = host

    def ready(self) -> bool:
        """Asked there."""
        return self._host.do(lambda: super(StackThere, self).ready())

    def get(self, path: str) -> bytes:
        """Asked there."""
        return self._host.do(lambda: super(StackThere, self).get(path))

    def _command(self) -> list[str]:
        return ["ip", "netns", "exec", self._host.name, *super()._command()]
