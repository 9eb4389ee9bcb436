"""Run a daemon, and send malformed bodies to it over a few connections."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.conftest import example
from tests.fuzz.bodies import malformed
from tests.support import forks

CONNECTIONS = 24
ALLOWED_STATUSES = {200, 400, 413, 422}
WARM_UP = 0.2  # share of the bodies after which every pool and cache has reached its size
MAX_GROWTH = 16 << 20  # bytes


@dataclass
class Result:
    """The result of a run."""

    bodies: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)  # wrong responses, with the body
    closed: int = 0  # connections closed by the daemon
    settled_rss: int = 0  # resident memory in bytes at the end of the warm-up
    end_rss: int = 0

    @property
    def growth(self) -> int:
        """Return by how many bytes memory has grown since the end of the warm-up."""
        return self.end_rss - self.settled_rss

    @property
    def passed(self) -> bool:
        """Return whether no response was wrong, and memory did not grow."""
        return not self.violations and self.growth < MAX_GROWTH


@dataclass
class Daemon:
    """A real daemon, and the token of a device without a rate limit."""

    port: int
    pid: int
    token: str


@contextmanager
def daemon() -> Iterator[Daemon]:
    """Run a daemon for the block."""
    with tempfile.TemporaryDirectory(prefix="nexhb-fuzz-") as folder:
        Path(folder).chmod(0o711)  # if root runs this, PostgreSQL's own user needs access
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXHB_")} | {
            "NEXHB_DATA_DIR": f"{folder}/data", "NEXHB_SERVER__PORT": "0", "NEXHB_JOBS__NIGHTLY": "",
            "NEXHB_JOBS__RECONCILE": "", "NEXHB_LOG_LEVEL": "info",
            "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000", "NEXHB_INGEST__DEVICE_BURST": "1000000",
        }  # fmt: skip
        log = Path(folder) / "log"
        with log.open("wb") as file, forks.start("nexhb", ["serve"], env=environment, stderr=file.fileno()) as process:
            try:
                port = _port(process, log)
                added = forks.run("nexhb", ["devices", "add", "fuzzed"], env=environment, check=True)
                yield Daemon(port, process.pid, added.stdout.strip())
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def _port(process: forks.Process, log: Path) -> int:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"daemon.started"' in line:
                return int(line.split('"url":"')[1].partition('"')[0].rpartition(":")[2])
    raise RuntimeError(f"the daemon ended: {log.read_text()[-2000:]}")


async def fuzz(target: Daemon, bodies: int, seed: int, progress: Callable[[Result], None]) -> Result:
    """Send `bodies` malformed bodies over CONNECTIONS concurrent connections."""
    result, chance = Result(), random.Random(seed)  # noqa: S311 - the seed repeats a run
    made_at = datetime.now(UTC)

    def settle() -> None:
        if not result.settled_rss and result.bodies >= WARM_UP * bodies:
            result.settled_rss = _rss(target.pid)

    async def send() -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while result.bodies < bodies:
            result.bodies += 1
            settle()
            if result.bodies % 10_000 == 0:
                progress(result)
            moment = made_at - timedelta(seconds=chance.randrange(600_000))
            body = malformed(example(moment, device_id="fuzzed"), chance)
            connection = connection or await asyncio.open_connection("127.0.0.1", target.port)
            try:
                is_list = chance.random() < 0.1
                status, response, stays_open = await _request(*connection, target.token, body, is_list=is_list)
            except (ConnectionError, asyncio.IncompleteReadError):
                result.closed += 1
                connection = None
                continue
            result.statuses[status] += 1
            if status not in ALLOWED_STATUSES and len(result.violations) < 20:
                result.violations.append(f"{status} {response[:300]!r} for {body[:2000]!r}")
            if not stays_open:
                connection[1].close()
                connection = None
        if connection:
            connection[1].close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(send())
    result.end_rss = _rss(target.pid)
    return result


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, body: bytes, *, is_list: bool
) -> tuple[int, bytes, bool]:
    path = "heartbeats" if is_list else "heartbeat"
    writer.write(
        f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        response = await reader.readexactly(length)
    return int(head.split(b" ", 2)[1]), response, b"connection: close" not in head.lower()


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0
