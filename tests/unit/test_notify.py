"""sd_notify: what is sent to $NOTIFY_SOCKET, and that no failure to send stops the daemon."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from nexhb import notify
from nexhb.notify import Notifier


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """The service manager's end of the socket."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as end:
        end.bind(address.replace("@", "\0"))
        end.settimeout(5)
        yield end


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A socket's address, in both forms that systemd uses."""
    return str(tmp_path / "notify") if request.param == "path" else f"@nexhb-test-{os.getpid()}"


def test_a_message_is_one_datagram_with_one_field_per_line(address: str) -> None:
    with listening(address) as end:
        assert Notifier(address).send(READY=1, STATUS="ready; queue 0")
        assert end.recv(4096) == b"READY=1\nSTATUS=ready; queue 0\n"


def test_a_reason_with_a_line_break_stays_within_its_field(address: str) -> None:
    with listening(address) as end:
        Notifier(address).send(STATUS="no\nREADY=1")
        assert end.recv(4096) == b"STATUS=no READY=1\n"


def test_a_reload_carries_the_monotonic_clock_and_a_timeout_is_extended_in_microseconds(address: str) -> None:
    with listening(address) as end:
        before = time.monotonic_ns() // 1000
        Notifier(address).reloading()
        reloading, clock = end.recv(4096).decode().split()
        assert reloading == "RELOADING=1"
        assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        Notifier(address).extend_timeout(1.5)
        assert end.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000\n"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_socket_nothing_happens(environment: dict[str, str]) -> None:
    manager = Notifier.from_environment(environment | {"WATCHDOG_USEC": "1000000"})
    assert (manager.send(READY=1), manager.watchdog_s) == (False, None)


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("3000000", "", 3.0),
        pytest.param("3000000", str(os.getpid()), 3.0, id="its own"),
        ("3000000", "1", None),
        ("0", "", None),
        ("x", "", None),
    ],
)
def test_the_watchdog_counts_only_if_it_watches_this_process(usec: str, pid: str, seconds: float | None) -> None:
    given = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": usec} | ({"WATCHDOG_PID": pid} if pid else {})
    assert Notifier.from_environment(given).watchdog_s == seconds


def test_a_service_manager_that_is_gone_or_stuck_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "SEND_S", 0.05)
    manager = Notifier(str(tmp_path / "notify"))
    assert not manager.send(READY=1)
    with listening(manager.address):
        while manager.send(WATCHDOG=1):
            pass  # until the socket's buffer is full: then send returns False, and does not raise
