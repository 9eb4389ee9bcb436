"""A machine with nexhb, as an operator sees it: a daemon process on its embedded PostgreSQL, and commands beside it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.process import Daemon, Launch, Process
from tests.conftest import SOON_S
from tests.support import forks

STOP_S = 20.0


class Site(Daemon):
    """A machine with nexhb. A test may change `settings` between two starts."""

    def __init__(self, folder: Path, start: Launch) -> None:
        super().__init__(folder, {}, start=start)
        self.daemons: list[Process] = []  # every daemon that was started

    def start(self, *options: str, until: str = "daemon.started") -> Process:
        """Start the daemon, wait until it logs this event, and return its process."""
        logged = self.log_path.stat().st_size if self.log_path.exists() else 0
        process = self.spawn("serve", *options, log=self.log_path)
        self.daemons.append(process)
        deadline = time.monotonic() + SOON_S
        while f'"{until}"'.encode() not in self.log_path.read_bytes()[logged:]:
            assert process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, f"no {until} in {self.log_path.read_text()}"
            time.sleep(0.01)
        return process

    def nexhb(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command beside the daemon."""
        argv = self.argv(*arguments)
        done = forks.run(argv[2], argv[3:], env=self.environment(), timeout=SOON_S)
        if check:
            assert done.returncode == 0, (arguments, done)
        return done

    def call(self, path: str, token: str = "", body: object = None) -> tuple[int, Any]:
        """Send a request: with `token` as a device, else as the admin."""
        key = f"Bearer {token}" if token else f"Bearer {(self.data_dir / 'admin_key').read_text().strip()}"
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": key, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@contextmanager
def new_site(start: Launch) -> Iterator[Site]:
    """Make a machine without data for the block; `start` starts its daemons."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-site-"))
    folder.chmod(0o711)  # if root runs this, PostgreSQL's own user must enter it
    site = Site(folder, start)
    yield site
    for daemon in site.daemons:
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
        daemon.wait(STOP_S)
    site.settings.clear()
    # A daemon that was killed has left its PostgreSQL running: this command is its last user, and stops it.
    site.nexhb("migrate")
    shutil.rmtree(folder)
