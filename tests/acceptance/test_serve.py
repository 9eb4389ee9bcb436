"""The daemon as a user runs it: a separate process on the embedded PostgreSQL, killed and restarted."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import SOON_S, example, shown
from tests.support.site import Site, new_site


@pytest.fixture
def site() -> Iterator[Site]:
    """A machine without data; its daemons are started as new processes of Python, not as forks."""
    with new_site(subprocess.Popen) as site:
        yield site


def test_a_first_heartbeat_is_stored_and_survives_a_restart(site: Site) -> None:
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


def test_status_gives_the_reason_if_it_shows_no_fleet(site: Site) -> None:
    site.start()
    site.settings["NEXHB_AUTH__ADMIN_KEY"] = "of-another-environment"
    found = site.nexhb("status", check=False)
    assert (found.returncode, "The admin key is missing or wrong." in found.stdout) == (1, True)
    del site.settings["NEXHB_AUTH__ADMIN_KEY"]
    (site.folder / "data" / "admin_key").unlink()
    assert "fleet: not shown, there is no admin key" in site.nexhb("status").stdout


def test_heartbeats_acknowledged_before_a_kill_are_stored_after_it(site: Site) -> None:
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
    missing = [made for made in acknowledged if shown(made) not in stored]
    assert missing == []
    assert len(stored) - len(acknowledged) in (0, 1)  # the heartbeat in progress may be stored


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
    assert "free space" in body["reasons"][0]
    assert site.call("/v1/fleet")[0] == 200  # reads continue
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(SOON_S) == 0


def test_a_second_daemon_on_the_same_port_reports_that_the_port_is_in_use(site: Site) -> None:
    site.start()
    second = site.nexhb("serve", check=False)
    assert second.returncode == 1  # not 2, after which systemd gives up: the port may be free in a moment
    assert f"server.port {site.port}" in second.stderr
    assert site.call("/v1/fleet")[0] == 200


def test_a_start_that_waits_for_its_database_can_be_stopped(site: Site) -> None:
    site.settings["NEXHB_DATABASE__URL"] = "postgresql://127.0.0.1:1/none"
    daemon = site.start(until="database.waiting")
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(SOON_S) == 0


def test_a_killed_postmaster_is_restarted(site: Site) -> None:
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
        """Wait up to a minute for the first 200. A backend may still respond after its postmaster has ended."""
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
def test_a_command_that_cannot_start_prints_the_reason(site: Site, name: str, value: str, said: str) -> None:
    site.settings[name] = value
    found = site.nexhb("migrate", check=False)
    assert found.returncode in (1, 2)
    assert said in found.stderr
    assert "Traceback" not in found.stderr
