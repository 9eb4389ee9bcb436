"""A daemon, a few devices, and bodies until there are enough."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.conftest import example
from tests.fuzz.bodies import malformed

LINES = 24
MAY_BE = {200, 400, 413, 422}
SETTLED = 0.2  # of the bodies: by then every pool and cache has its size
GROWTH_MOST = 16 << 20


@dataclass
class Result:
    """What came of it."""

    bodies: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # answers that should not be, with the body
    cut: int = 0  # connections closed by the daemon
    settled_rss: int = 0  # bytes
    end_rss: int = 0

    @property
    def growth(self) -> int:
        """Bytes, from when the daemon had settled."""
        return self.end_rss - self.settled_rss

    @property
    def good(self) -> bool:
        """No answer that should not be, and memory flat."""
        return not self.broken and self.growth < GROWTH_MOST


@dataclass
class Daemon:
    """A real one, with devices that may send as often as they like."""

    port: int
    pid: int
    token: str


@contextmanager
def daemon() -> Iterator[Daemon]:
    """Run one for the block."""
    with tempfile.TemporaryDirectory(prefix="nexhb-fuzz-") as folder:
        Path(folder).chmod(0o711)  # as root, PostgreSQL's own user must pass
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXHB_")} | {
            "NEXHB_DATA_DIR": f"{folder}/data", "NEXHB_SERVER__PORT": "0", "NEXHB_JOBS__NIGHTLY": "",
            "NEXHB_JOBS__RECONCILE": "", "NEXHB_LOG_LEVEL": "info",
            "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000", "NEXHB_INGEST__DEVICE_BURST": "1000000",
        }  # fmt: skip
        command = [sys.executable, "-m", "nexhb"]
        log = Path(folder) / "log"
        with log.open("wb") as file, subprocess.Popen([*command, "serve"], env=environment, stderr=file) as process:
            try:
                port = _port(process, log)
                added = subprocess.run(
                    [*command, "devices", "add", "fuzzed"], env=environment, check=True, capture_output=True, text=True
                )
                yield Daemon(port, process.pid, added.stdout.strip())
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"daemon.started"' in line:
                return int(line.split('"url":"')[1].partition('"')[0].rpartition(":")[2])
    raise RuntimeError(f"the daemon ended: {log.read_text()[-2000:]}")


async def fuzz(target: Daemon, bodies: int, seed: int, progress: Callable[[Result], None]) -> Result:
    """Send `bodies` malformed bodies over a few lines at once."""
    result, chance = Result(), random.Random(seed)  # noqa: S311 - it is to be repeated
    made_at = datetime.now(UTC)

    def settle() -> None:
        if not result.settled_rss and result.bodies >= SETTLED * bodies:
            result.settled_rss = _rss(target.pid)

    async def send() -> None:
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while result.bodies < bodies:
            result.bodies += 1
            settle()
            if result.bodies % 10_000 == 0:
                progress(result)
            moment = made_at - timedelta(seconds=chance.randrange(600_000))
            body = malformed(example(moment, device_id="fuzzed"), chance)
            line = line or await asyncio.open_connection("127.0.0.1", target.port)
            try:
                status, answer, open_ = await _ask(*line, target.token, body, batch=chance.random() < 0.1)
            except (ConnectionError, asyncio.IncompleteReadError):
                result.cut += 1
                line = None
                continue
            result.statuses[status] += 1
            if status not in MAY_BE and len(result.broken) < 20:
                result.broken.append(f"{status} {answer[:300]!r} for {body[:2000]!r}")
            if not open_:
                line[1].close()
                line = None
        if line:
            line[1].close()

    async with asyncio.TaskGroup() as group:
        for _ in range(LINES):
            group.create_task(send())
    result.end_rss = _rss(target.pid)
    return result


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, body: bytes, *, batch: bool
) -> tuple[int, bytes, bool]:
    path = "heartbeats" if batch else "heartbeat"
    writer.write(
        f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await reader.readexactly(length)
    return int(head.split(b" ", 2)[1]), answer, b"connection: close" not in head.lower()


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0
