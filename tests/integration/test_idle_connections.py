"""Formerly, with a lower limit of open files than server.connections_max, a thousand idle connections used the last
file descriptor. The check of the embedded PostgreSQL then failed, and the daemon stopped, with PostgreSQL. Connections
now leave descriptors for the daemon, and a check of PostgreSQL that cannot run does not stop the daemon."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.process import free_port

OPEN_FILES = 400


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that PostgreSQL's own user can enter."""
    made = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def test_a_thousand_idle_connections_do_not_end_the_daemon(folder: Path) -> None:
    port = free_port()
    ours = {"NEXHB_DATA_DIR": str(folder / "data"), "NEXHB_SERVER__PORT": str(port), "NEXHB_JOBS__NIGHTLY": ""}
    command = f'ulimit -n {OPEN_FILES}; exec "{sys.executable}" -m nexhb serve'
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(["/bin/sh", "-c", command], env=os.environ | ours, stderr=log)
    try:
        while '"daemon.started"' not in (folder / "log").read_text():
            assert daemon.poll() is None, (folder / "log").read_text()
        with ExitStack() as idle:
            for _ in range(1000):
                idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(20):  # PostgreSQL is checked several times while these connections open
                assert healthy(port)
            assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) < OPEN_FILES
        assert daemon.poll() is None
        assert '"daemon.fewer_connections"' in (folder / "log").read_text()
    finally:
        daemon.terminate()
        daemon.wait(30)
    assert daemon.returncode == 0, (folder / "log").read_text()
