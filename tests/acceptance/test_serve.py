"""The daemon as its user runs it: a process of its own, on the embedded PostgreSQL, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SOON_S, example


@dataclass
class Site:
    """A machine with nexhb on it."""

    folder: Path
    port: int
    commands: Path
    daemons: list[subprocess.Popen[str]]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What an operator would have set."""
        own = {"NEXHB_DATA_DIR": str(self.folder / "data"), "NEXHB_SERVER__PORT": str(self.port)}
        return os.environ | own | {"PATH": f"{self.commands}:{os.environ['PATH']}"} | self.settings

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> subprocess.Popen[str]:
        """Start the daemon and wait until it is ready."""
        daemon = subprocess.Popen(
            [sys.executable, "-m", "nexhb", "serve"], env=self.environment, stderr=subprocess.PIPE, text=True
        )
        self.daemons.append(daemon)
        assert daemon.stderr is not None
        for line in daemon.stderr:
            if '"daemon.started"' in line:
                threading.Thread(target=daemon.stderr.read, daemon=True).start()  # a full pipe would stop it
                return daemon
        raise AssertionError(f"it ended with {daemon.wait()}")

    def nexhb(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command beside it."""
        return subprocess.run(
            ["nexhb", *arguments],
            env=self.environment, check=check, capture_output=True, text=True, timeout=50,
        )  # fmt: skip

    def call(self, path: str, token: str = "", body: object = None) -> tuple[int, Any]:
        """One request; with `token` a device's, else the admin's."""
        key = f"Bearer {token}" if token else f"Bearer {(self.folder / 'data' / 'admin_key').read_text().strip()}"
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def site(commands: Path) -> Iterator[Site]:
    """An empty machine."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-site-"))
    folder.chmod(0o711)
    site = Site(folder, _free_port(), commands, [])
    yield site
    for daemon in site.daemons:
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
        daemon.wait(20)
        assert daemon.stderr is not None
        daemon.stderr.close()
    # Whoever killed a daemon left its PostgreSQL: a command that uses it is the last to leave, and stops it.
    site.nexhb("migrate")
    shutil.rmtree(folder)


def test_a_first_heartbeat_comes_back_and_the_next_start_has_the_data(site: Site) -> None:
    daemon = site.start()
    token = site.nexhb("devices", "add", "kiosk-1").stdout.strip()
    made = datetime.now(UTC)
    status, body = site.call("/v1/heartbeat", token, example(made))
    assert (status, body["ok"]) == (200, True)
    assert site.call("/v1/devices/kiosk-1")[1]["battery_pct"] == 87
    assert site.nexhb("status").stdout.startswith(f"{site.url}: ready")

    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(SOON_S) == 0

    site.start()
    assert site.call("/v1/devices/kiosk-1")[1]["battery_pct"] == 87
    assert site.call("/v1/heartbeat", token, example(made))[1]["deduplicated"] is True


def test_status_says_why_it_shows_no_fleet(site: Site) -> None:
    site.start()
    site.settings["NEXHB_AUTH__ADMIN_KEY"] = "of-another-environment"
    found = site.nexhb("status", check=False)
    assert (found.returncode, "The admin key is missing or wrong." in found.stdout) == (1, True)
    del site.settings["NEXHB_AUTH__ADMIN_KEY"]
    (site.folder / "data" / "admin_key").unlink()
    assert "fleet: not shown, there is no admin key" in site.nexhb("status").stdout


def test_what_was_acknowledged_before_a_kill_is_there_after_it(site: Site) -> None:
    daemon = site.start()
    token = site.nexhb("devices", "add", "kiosk-1").stdout.strip()
    start = datetime.now(UTC) - timedelta(hours=20)
    acknowledged: list[datetime] = []

    def send() -> None:
        for number in range(5000):
            made = start + timedelta(seconds=10 * number)
            try:
                if site.call("/v1/heartbeat", token, example(made))[0] == 200:
                    acknowledged.append(made)
            except OSError:
                return

    sender = threading.Thread(target=send)
    sender.start()
    while len(acknowledged) < 200:
        time.sleep(0.01)
    daemon.send_signal(signal.SIGKILL)
    sender.join(30)
    site.start()
    path = "/v1/devices/kiosk-1/heartbeats?limit=10000"
    stored = {beat["ts"] for beat in site.call(path)[1]["heartbeats"]}
    missing = [made for made in acknowledged if f"{made:%Y-%m-%dT%H:%M:%S.%fZ}" not in stored]
    assert missing == []
    assert len(stored) - len(acknowledged) in (0, 1)  # the one under way may be in


def test_a_disk_that_runs_full_stops_the_intake_before_it_stops_postgresql(site: Site) -> None:
    site.settings["NEXHB_DATABASE__DISK_RESERVE_BYTES"] = str(2**60)
    daemon = site.start()
    token = site.nexhb("devices", "add", "kiosk-1").stdout.strip()

    def refused() -> bool:
        status, body = site.call("/v1/heartbeat", token, example(datetime.now(UTC)))
        return status == 503 and "MiB are free" in body["detail"]

    deadline = time.monotonic() + SOON_S
    while not refused():
        assert time.monotonic() < deadline
    status, body = site.call("/readyz")
    assert status == 503
    assert "make room" in body["reasons"][0]
    assert site.call("/v1/fleet")[0] == 200  # reading goes on
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(SOON_S) == 0


def test_a_second_daemon_on_the_same_port_says_so(site: Site) -> None:
    site.start()
    second = site.nexhb("serve", check=False)
    assert second.returncode == 1  # not 2, after which systemd gives it up: the port may be free in a moment
    assert f"server.port {site.port}" in second.stderr
    assert site.call("/v1/fleet")[0] == 200


def test_a_start_that_waits_for_its_database_can_be_stopped(site: Site) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-m", "nexhb", "serve"],
        env=site.environment | {"NEXHB_DATABASE__URL": "postgresql://127.0.0.1:1/none"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    site.daemons.append(daemon)
    assert daemon.stderr is not None
    assert any('"database.waiting"' in line for line in daemon.stderr)
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(SOON_S) == 0


def test_a_postmaster_that_is_killed_is_started_again(site: Site) -> None:
    site.start()
    token = site.nexhb("devices", "add", "kiosk-1").stdout.strip()
    assert site.call("/v1/heartbeat", token, example(datetime.now(UTC)))[0] == 200
    pid_file = site.folder / "data" / "pg" / "postmaster.pid"

    def postmaster() -> int:
        return int(pid_file.read_text().split("\n")[0] or 0) if pid_file.exists() else 0

    killed = postmaster()
    os.kill(killed, signal.SIGKILL)
    made = datetime.now(UTC) - timedelta(minutes=5)

    def at_last(path: str, *request: Any) -> Any:
        """The first 200, within a minute: a backend may still answer when the postmaster is gone."""
        deadline = time.monotonic() + SOON_S
        while (found := site.call(path, *request))[0] != 200:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found[1]

    while postmaster() in (killed, 0):
        time.sleep(0.05)
    at_last("/v1/heartbeat", token, example(made))
    assert len(at_last("/v1/devices/kiosk-1/heartbeats")["heartbeats"]) == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NEXHB_SERVER__PORT", "99999", "server.port"),
        ("NEXHB_SERVER__COLOUR", "red", "server.colour"),
        ("NEXHB_DATABASE__URL", "postgresql://127.0.0.1:1/none", "database"),
        ("NEXHB_DATABASE__URL", "postgresql://127.0.0.1:port/none", "database.url"),
    ],
)
def test_what_cannot_start_says_why(site: Site, name: str, value: str, said: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "nexhb", "migrate"],
        env=site.environment | {name: value}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert found.returncode in (1, 2)
    assert said in found.stderr
    assert "Traceback" not in found.stderr
