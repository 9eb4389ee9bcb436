"""Very long queues, sent to a separate daemon process: the memory that they use, and the rows that a kill leaves."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import example
from tests.support.site import Site

LINES = 100_000
GROWTH_MOST_KB = 30_000  # the body has 60 MB


def lines(now: datetime, count: int) -> Iterator[bytes]:
    """Yield one heartbeat per second, the oldest first, in pieces of a hundred."""
    rest = json.dumps({"app_versions": example(now)["app_versions"], "filler": "x" * 330})[1:]
    for first in range(0, count, 100):
        made = (now - timedelta(seconds=count - number) for number in range(first, min(first + 100, count)))
        yield "".join(f'{{"timestamp_utc":"{one:%Y-%m-%dT%H:%M:%S}Z",{rest}\n' for one in made).encode()


def open_queue(site: Site, token: str) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", site.port), timeout=50)
    line.sendall(
        f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
        "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    return line


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


def answer_of(line: socket.socket) -> tuple[int, dict[str, object]]:
    with line, line.makefile("rb") as found:
        head, _, body = found.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def memory_kb(pid: int, name: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (the peak since the last reset) of a process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


@pytest.fixture
def device(site: Site) -> str:
    """Start a daemon that accepts long queues, and return a device's token."""
    site.settings |= {"NEXHB_INGEST__DEVICE_BURST": "1000000", "NEXHB_INGEST__BUCKET_SECONDS": "1"}
    site.start()
    return site.nexhb("devices", "add", "gateway").stdout.strip()


def test_a_hundred_thousand_heartbeats_in_one_body_use_little_memory(site: Site, device: str) -> None:
    pid = site.daemons[-1].pid
    now = datetime.now(UTC)

    def send(count: int) -> dict[str, object]:
        line = open_queue(site, device)
        for part in lines(now, count):
            line.sendall(chunk(part))
        line.sendall(b"0\r\n\r\n")
        status, answer = answer_of(line)
        assert status == 200
        return answer

    send(2_000)  # a first queue, so that memory that every queue needs is allocated before it is measured
    before = memory_kb(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
    answer = send(LINES)
    assert (answer["written"], answer["deduplicated"]) == (LINES - 2_000, 2_000)
    assert memory_kb(pid, "VmHWM") - before < GROWTH_MOST_KB


def test_after_a_kill_within_a_queue_the_committed_part_is_stored_and_a_retry_adds_the_rest(
    site: Site,
    device: str,
) -> None:
    now = datetime.now(UTC)
    parts = list(lines(now, 3_000))
    with open_queue(site, device) as line:
        for part in parts[:20]:
            line.sendall(chunk(part))
        while not site.call("/v1/devices/gateway/heartbeats?limit=1")[1]["heartbeats"]:
            pass
        site.daemons[-1].send_signal(signal.SIGKILL)
        site.daemons[-1].wait(20)
    site.start()
    kept = len(site.call("/v1/devices/gateway/heartbeats?limit=10000")[1]["heartbeats"])
    assert 0 < kept <= 2_000
    line = open_queue(site, device)
    line.sendall(b"".join(map(chunk, parts)) + b"0\r\n\r\n")
    status, answer = answer_of(line)
    assert (status, answer["written"], answer["deduplicated"]) == (200, 3_000 - kept, kept)
    for days in (0, 1):
        day = (now - timedelta(days=days)).date()
        assert json.loads(site.nexhb("audit", "--day", str(day), "--json").stdout)["missing"] == 0
