"""A daemon whose stderr is a full disk, a pipe without a reader or a closed pipe continues, and counts lost lines."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from bench.process import free_port
from nexhb.postgres.connections import Database
from tests.conftest import ADMIN_KEY
from tests.support import forks
from tests.support.pipes import fill


def full_disk() -> tuple[int, ...]:
    """Return a file on which every write fails."""
    return (os.open("/dev/full", os.O_WRONLY),)


def left() -> tuple[int, ...]:
    """Return a pipe whose reader is gone, like that of a log collector that died."""
    reads, writes = os.pipe()
    os.close(reads)
    return (writes,)


def unread() -> tuple[int, ...]:
    """Return a full pipe that is not read, like that of a stopped log collector."""
    reads, writes = os.pipe()
    fill(writes)
    os.set_blocking(writes, True)
    return writes, reads


@pytest.mark.parametrize("stderr", [full_disk, left, unread])
async def test_the_daemon_keeps_serving_and_stops_with_exit_code_0(
    database: Database, tmp_path: Path, stderr: Callable[[], tuple[int, ...]]
) -> None:
    """Formerly, the first log line that could not be written to a full disk ended the daemon."""
    port, files = free_port(), stderr()
    settings = {
        "NEXHB_DATABASE__URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "NEXHB_SERVER__PORT": str(port),
        "NEXHB_AUTH__ADMIN_KEY": ADMIN_KEY, "NEXHB_JOBS__NIGHTLY": "", "NEXHB_JOBS__RECONCILE": "",
    }  # fmt: skip
    daemon = forks.start("nexhb", ["serve", "--welcome"], env=os.environ | settings, stderr=files[0])
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http, asyncio.timeout(100):
            await until_it_serves(http, daemon)
            for _ in range(300):  # each request causes a log line
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"\0\r\n\r\n")
                await reader.read()
                writer.close()
            async with http.get("/readyz") as ready:
                assert ready.status == 200
            assert await lines_lost(http) > 0
        daemon.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait, 30) == 0
    finally:
        daemon.kill()
        daemon.wait()
        for descriptor in files:
            os.close(descriptor)


async def until_it_serves(http: aiohttp.ClientSession, daemon: forks.Process) -> None:
    """Wait until the daemon is ready. Raise AssertionError if it ends before."""
    while daemon.poll() is None:
        try:
            async with http.get("/readyz") as ready:
                if ready.status == 200:
                    return
        except aiohttp.ClientError:
            await asyncio.sleep(0.05)
    raise AssertionError(f"the daemon ended with {daemon.returncode}")


async def lines_lost(http: aiohttp.ClientSession) -> float:
    """Wait for lost lines, which the daemon counts twice per second; return their number."""
    while True:
        async with http.get("/metrics", headers={"x-admin": ADMIN_KEY}) as found:
            [lost] = re.findall(r"^nexhb_log_lines_lost_total (\S+)$", await found.text(), re.MULTILINE)
        if float(lost):
            return float(lost)
