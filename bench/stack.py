"""A daemon for a single run: a folder, a child process, its embedded PostgreSQL; all are removed at the end."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import asyncpg
import orjson

from bench.cost import Memory, memory_of
from bench.fleet import Device, write_csv
from bench.process import HOST, Daemon, Process
from nexhb import keys
from nexhb.postgres import embedded
from nexhb.postgres.account import USER

# set if the daemon uses a PostgreSQL that the run itself starts and stops
DATABASE_URL: Final = "NEXHB_DATABASE__URL"
# initdb and the first migration take 2 s, crash recovery after a kill a little longer
_READY_S: Final = 90.0
# the daemon's own timeouts at a stop: pending requests 10 s, the writer 10 s, PostgreSQL 30 s
_STOP_S: Final = 60.0
# No schedule: a missed nightly run would begin within half a minute of a start, during a measurement. Runs start jobs
# by POST.
_NO_SCHEDULE: Final = {"NEXHB_JOBS__NIGHTLY": "", "NEXHB_JOBS__RECONCILE": ""}


class StackError(RuntimeError):
    """The daemon of a run failed."""


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect to a database; the connection is closed when the block ends."""
    settings = {"application_name": "nexhb bench", "timezone": "UTC"}
    conn = await asyncpg.connect(dsn, timeout=10, command_timeout=7200, server_settings=settings)
    try:
        yield conn
    finally:
        await conn.close(timeout=5)


class Stack(Daemon):
    """One daemon and its data. Calls block: from an event loop, use `asyncio.to_thread`."""

    def __init__(self, folder: Path, settings: Mapping[str, str], *, shared_port: int | None = None) -> None:
        """Prepare in an existing folder; `settings` are NEXHB_… variables. With `shared_port` the daemon also listens
        on that port, together with other daemons, and `port` is the port of this daemon alone."""
        super().__init__(folder, _NO_SCHEDULE | dict(settings))
        if shared_port is not None:
            own = {"NEXHB_SERVER__INSTANCE_PORT": str(self.port), "NEXHB_SERVER__REUSE_PORT": "true"}
            self.settings |= own | {"NEXHB_SERVER__PORT": str(shared_port)}
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """Return the daemon's process id."""
        if self._process is None:
            raise StackError("the daemon is not running")
        return self._process.pid

    def start(self) -> float:
        """Start the daemon and wait until it can commit; return the seconds that took."""
        began = time.monotonic()
        self._process = self.spawn("serve", log=self.log_path)
        while not self.ready():
            if self._process.poll() is not None:
                raise StackError(f"the daemon ended with {self._process.returncode}:\n{self._last_words()}")
            if time.monotonic() - began > _READY_S:
                raise StackError(f"the daemon was not ready within {_READY_S:.0f} s:\n{self._last_words()}")
            time.sleep(0.02)
        return time.monotonic() - began

    def kill(self) -> None:
        """Send SIGKILL to the daemon alone: its PostgreSQL keeps running, and the daemon's next start uses it."""
        if self._process is not None:
            self._process.kill()
            self._reap(self._process)

    def stop(self) -> None:
        """Stop the daemon by SIGTERM, then its embedded PostgreSQL if that is still running."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._reap(self._process)
        if self._postmaster_lives():
            # the embedded PostgreSQL stops when the last process that uses it stops: start such a process and stop it
            embedded.start(self.data_dir).stop()

    def _reap(self, process: Process) -> None:
        self._process = None
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise StackError(f"the daemon did not end within {_STOP_S:.0f} s:\n{self._last_words()}") from None

    def ready(self) -> bool:
        """Return whether /readyz reports that the daemon can commit."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._request("GET", "/readyz", 5, {})[0] == 200
        return False

    def _last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-20:])

    def import_fleet(self, fleet: Sequence[Device]) -> None:
        """Import the devices with the operator's command, `nexhb devices import`."""
        file = self.folder / "fleet.csv"
        file.touch(mode=0o600)
        with file.open("w", encoding="utf-8", newline="") as out:
            write_csv(fleet, out)
        counts = self.command("devices", "import", str(file), "--json", timeout_s=120)
        if counts["rows"] != len(fleet):
            raise StackError(f"{counts} devices were imported, not {len(fleet)}")

    def command(self, *words: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Run `nexhb … --json` with the daemon's settings and return its output."""
        done = self.run(*words, timeout_s=timeout_s)
        if done.returncode != 0:
            raise StackError(f"nexhb {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
        output: dict[str, Any] = orjson.loads(done.stdout)
        return output

    def post(self, path: str, *, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """Send POST `path` with the admin key; return the status and the JSON of the response."""
        status, body = self._request("POST", path, timeout_s, {"x-admin": self.admin_key})
        answer: dict[str, Any] = orjson.loads(body)
        return status, answer

    def metrics(self) -> dict[str, float]:
        """Return the current samples of GET /metrics: name → the sum over all labels."""
        status, body = self._request("GET", "/metrics", 30, {"x-admin": self.admin_key})
        if status != 200:
            raise StackError(f"GET /metrics returned {status}: {body[:500]!r}")
        sums: dict[str, float] = {}
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                name = sample.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _request(self, method: str, path: str, timeout_s: float, headers: Mapping[str, str]) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)) as connection:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            return response.status, response.read()

    @property
    def admin_key(self) -> str:
        """Return the admin key that the daemon made at its first start."""
        return (self.data_dir / keys.FILE).read_text(encoding="ascii").strip()

    @property
    def postmaster_pid(self) -> int:
        """Return the process id of the embedded PostgreSQL."""
        return int(self._postmaster_file()[0])

    @property
    def dsn(self) -> str:
        """Return the URL of the daemon's PostgreSQL: the configured URL, or the socket of the embedded server."""
        if configured := self.settings.get(DATABASE_URL):
            return configured
        socket_dir = self._postmaster_file()[4]
        return f"postgresql://{USER}@/{USER}?host={quote(socket_dir)}&port=5432"

    def dsn_of(self, database: str) -> str:
        """Return the URL of another database of the same PostgreSQL."""
        head, _, query = self.dsn.partition("?")
        return f"{head.rpartition('/')[0]}/{database}?{query}"

    @contextlib.asynccontextmanager
    async def connected(self, database: str | None = None) -> AsyncIterator[asyncpg.Connection]:
        """Connect to the daemon's database, or to another database of the same PostgreSQL."""
        async with connected(self.dsn if database is None else self.dsn_of(database)) as conn:
            yield conn

    def memory(self) -> Memory:
        """Return the daemon's memory, without PostgreSQL's."""
        return memory_of(self.pid)

    def _postmaster_file(self) -> list[str]:
        return (self.data_dir / "pg" / "postmaster.pid").read_text(encoding="utf-8").splitlines()

    def _postmaster_lives(self) -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return Path("/proc", str(self.postmaster_pid), "cwd").samefile(self.data_dir / "pg")
        return False


@contextlib.contextmanager
def running(fleet: Sequence[Device] = (), *, settings: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Run a daemon with the devices of the fleet imported. Its folder is removed at the end."""
    with run_folder() as folder:
        stack = Stack(folder, settings or {})
        try:
            stack.start()
            if fleet:
                stack.import_fleet(fleet)
            yield stack
        finally:
            stack.stop()


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Yield an empty folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="nexhb-bench-", ignore_cleanup_errors=True) as made:
        if os.geteuid() == 0:
            # for root, PostgreSQL runs as a system user, which needs permission to traverse the folder
            Path(made).chmod(0o711)
        yield Path(made)


class Postgres:
    """A PostgreSQL that the run starts and stops; a daemon knows only its URL, which is the same after each start."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self.start()

    def start(self) -> None:
        """Start PostgreSQL and wait until it accepts connections."""
        self._server = embedded.start(self._data_dir)
        self.dsn = self._server.dsn
        self.pid = int((self._data_dir / "pg" / "postmaster.pid").read_text(encoding="utf-8").split()[0])

    def stop(self) -> None:
        """Stop PostgreSQL as an operator would (fast): sessions are closed, their transactions rolled back."""
        self._server.stop()


@contextlib.contextmanager
def postgres() -> Iterator[tuple[Path, Postgres]]:
    """Run a PostgreSQL that no daemon owns, in a folder of its own."""
    with run_folder() as folder:
        server = Postgres(folder / "postgres")
        try:
            yield folder, server
        finally:
            server.stop()
