"""A real S3 server for the tests: OpenStack Swift in its own virtual environment, since it needs eventlet. It runs as
four processes on free ports of 127.0.0.1. `python -m tests.swift` creates the environment, once."""

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
MAX_STARTS = 3
START_S = 40  # timeout of a start, which takes 1 s on 2 idle cores
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
    """The address of an S3 server (path style, us-east-1), and its key."""

    url: str
    key: str
    secret: str = field(repr=False)


def make_venv() -> None:
    """Create Swift's virtual environment if it is absent or outdated. If several processes call this, the first creates
    it."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    with REQUIREMENTS.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = VENV / ".made"
        if marker.exists() and marker.read_text() == digest:
            return
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
        marker.write_text(digest)


@contextmanager
def running() -> Iterator[S3Server]:
    """Run Swift for the block. If another process takes one of the free ports before Swift does, start again.

    Raises RuntimeError with the logs of the servers.
    """
    make_venv()
    for attempt in range(1, MAX_STARTS + 1):
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="nexhb-swift-", dir=_disk_with_attributes()))
            stack.callback(shutil.rmtree, folder)
            ports = _free_ports()
            _configure(folder, ports)
            servers = [stack.enter_context(_server(kind, folder)) for kind in KINDS]
            if _accept_connections(ports, servers):
                yield S3Server(f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing")
                return
            logs = "\n".join(f"{kind}: {(folder / f'{kind}.log').read_text()[-2000:]}" for kind in KINDS)
        if "Could not bind" not in logs or attempt == MAX_STARTS:
            raise RuntimeError(f"Swift did not start.\n{logs}")


def _disk_with_attributes() -> Path:
    """Return a folder with extended attributes, in which Swift keeps metadata; tmpfs has them since Linux 6.6."""
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
        process.kill()  # the server's data is deleted anyway, and the server has no children
        process.wait()


def _accept_connections(ports: dict[str, int], servers: list[subprocess.Popen[bytes]]) -> bool:
    """Return whether every server accepts connections within START_S; False as soon as one has exited."""
    deadline = time.monotonic() + START_S
    waiting = dict(ports)
    while waiting and time.monotonic() < deadline and all(server.poll() is None for server in servers):
        waiting = {kind: port for kind, port in waiting.items() if not _is_swift(kind, port)}
        time.sleep(0.02)
    return not waiting


def _is_swift(kind: str, port: int) -> bool:
    """Return whether the response comes from Swift, not from another process that has taken the port meanwhile."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("OPTIONS", "/")
        response = connection.getresponse()
        return bool(response.getheader("X-Trans-Id")) or f"{kind}-server" in (response.getheader("Server") or "")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    make_venv()
