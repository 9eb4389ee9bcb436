"""A real S3 server for the tests: OpenStack Swift in a virtual environment of its own (it needs eventlet), four
processes on free ports of 127.0.0.1. `python -m tests.swift` makes the environment, once."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-swift"
PYTHON = str(VENV / "bin" / "python")
REQUIREMENTS = ROOT / "tests" / "swift-requirements.txt"
SERVERS = ROOT / "tests" / "swift_servers.py"
STARTS = 3
START_S = 40  # for one; it takes 1 s on 2 idle cores
KINDS = ("account", "container", "object", "proxy")

_SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = nexhb
[storage-policy:0]
name = one
default = yes
"""
_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 0
bind_timeout = 1
log_level = WARNING
"""
_STORAGE = """
devices = {folder}/devices
mount_check = false
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """
[pipeline:main]
pipeline = catch_errors cache bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


@dataclass(frozen=True)
class S3Server:
    """Where an S3 server answers (path style, us-east-1), and the key it takes."""

    url: str
    key: str
    secret: str = field(repr=False)


def make_venv() -> None:
    """Swift's virtual environment as the requirements say; made once, whoever of several asks first."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    with REQUIREMENTS.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = VENV / ".made"
        if made.exists() and made.read_text() == wanted:
            return
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
        made.write_text(wanted)


@contextmanager
def running() -> Iterator[S3Server]:
    """A Swift that serves for the block. A port that somebody took meanwhile costs another start.

    Raises RuntimeError with what the servers said.
    """
    make_venv()
    for attempt in range(1, STARTS + 1):
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="nexhb-swift-", dir=_disk_with_attributes()))
            stack.callback(shutil.rmtree, folder)
            ports = _free_ports()
            _configure(folder, ports)
            servers = [stack.enter_context(_server(kind, folder)) for kind in KINDS]
            if _answer(ports, servers):
                yield S3Server(f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing")
                return
            said = "\n".join(f"{kind}: {(folder / f'{kind}.log').read_text()[-2000:]}" for kind in KINDS)
        if "Could not bind" not in said or attempt == STARTS:
            raise RuntimeError(f"Swift did not start.\n{said}")


def _disk_with_attributes() -> Path:
    """Swift keeps metadata in extended attributes, which a tmpfs takes only from Linux 6.6 on."""
    with tempfile.NamedTemporaryFile() as probe:
        try:
            os.setxattr(probe.name, "user.probe", b"1")
        except OSError:
            return ROOT
    return Path(tempfile.gettempdir())


def _free_ports() -> dict[str, int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in KINDS]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return {kind: sock.getsockname()[1] for kind, sock in zip(KINDS, sockets, strict=True)}


def _configure(folder: Path, ports: dict[str, int]) -> None:
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text(_SWIFT_CONF)
    for kind, port in ports.items():
        text = _COMMON + (_PROXY if kind == "proxy" else _STORAGE)
        (folder / f"{kind}.conf").write_text(
            text.format(kind=kind, port=port, folder=folder, user=pwd.getpwuid(os.getuid()).pw_name)
        )
    storage = [f"{kind}={port}" for kind, port in ports.items() if kind != "proxy"]
    subprocess.run([PYTHON, "-I", str(SERVERS), "rings", str(folder), *storage], check=True)


@contextmanager
def _server(kind: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{kind}.log").open("wb") as log:
        command = [PYTHON, "-I", str(SERVERS), "serve", kind, str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # the data goes with it, and it has no children
        process.wait()


def _answer(ports: dict[str, int], servers: list[subprocess.Popen[bytes]]) -> bool:
    """Whether every server takes connections before START_S; False once one of them has ended."""
    deadline = time.monotonic() + START_S
    waiting = dict(ports)
    while waiting and time.monotonic() < deadline and all(server.poll() is None for server in servers):
        waiting = {kind: port for kind, port in waiting.items() if not _is_swift(kind, port)}
        time.sleep(0.02)
    return not waiting


def _is_swift(kind: str, port: int) -> bool:
    """Whether it is Swift that answers there, and not whoever took the port meanwhile."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("OPTIONS", "/")
        answer = connection.getresponse()
        return bool(answer.getheader("X-Trans-Id")) or f"{kind}-server" in (answer.getheader("Server") or "")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    make_venv()
