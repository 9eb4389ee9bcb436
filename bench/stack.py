"""A daemon of one's own for a run: a folder, a child process, its embedded PostgreSQL; all of it gone at the end."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import asyncpg
import orjson

from bench.cost import Memory, memory_of
from bench.fleet import Device, write_csv
from bench.scrape import Scrape, parse
from nexhb import embedded, keys
from nexhb.pgaccount import USER

# what a run sets to have its daemon use a PostgreSQL that the run itself starts and stops
DATABASE_URL: Final = "NEXHB_DATABASE__URL"
_HOST: Final = "127.0.0.1"
# initdb and the first migration take 2 s, crash recovery after a kill some more
_READY_S: Final = 90.0
# the daemon's own bounds: requests under way 10 s, the writer 10 s, PostgreSQL 30 s
_STOP_S: Final = 60.0
_IMPORT_S: Final = 120.0
_POLL_S: Final = 0.02
# A missed nightly run is made up within half a minute of a start, in the middle of a measurement: jobs are run by POST.
_NO_SCHEDULE: Final = {"NEXHB_JOBS__NIGHTLY": "", "NEXHB_JOBS__RECONCILE": ""}
# below the kernel's ephemeral range: while the daemon is dead no client's own port may be the daemon's
_PORTS: Final = (20_000, 32_000)


class StackError(RuntimeError):
    """The daemon of a run did not do what it must."""


def free_port() -> int:
    """A port that nobody listens on."""
    rng = random.Random(os.urandom(8))
    for _ in range(100):
        port = rng.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port
    raise StackError(f"no free port between {_PORTS[0]} and {_PORTS[1]}")


async def connect(dsn: str) -> asyncpg.Connection:
    """A connection of a run's own."""
    settings = {"application_name": "nexhb bench", "timezone": "UTC"}
    return await asyncpg.connect(dsn, timeout=10, command_timeout=600, server_settings=settings)


class Stack:
    """One daemon and its data. Calls block: from an event loop, use `asyncio.to_thread`."""

    def __init__(self, folder: Path, settings: Mapping[str, str], *, shared_port: int | None = None) -> None:
        """Prepare in an existing folder; `settings` are NEXHB_… variables. With a shared port the daemon answers there
        as well, beside others, and `port` is its own."""
        self.folder = folder
        self._shared_port = shared_port
        self.data_dir = folder / "data"
        self.log_path = folder / "daemon.log"
        self.port = free_port()
        self.url = f"http://{_HOST}:{self.port}"
        self._config = folder / "nexhb.toml"
        # an empty file: neither the caller's ./nexhb.toml nor /etc/nexhb/nexhb.toml has a say here
        self._config.touch()
        self._settings = dict(settings)
        self._process: subprocess.Popen[bytes] | None = None

    # ── the daemon ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self._process is None:
            raise StackError("the daemon does not run")
        return self._process.pid

    def start(self) -> float:
        """Start it and wait until it can commit; the seconds that took."""
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command(), "serve"],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for the bench, which then stops the daemon in order
                start_new_session=True,
            )
        while not self.ready():
            if self._process.poll() is not None:
                raise StackError(f"the daemon ended with {self._process.returncode}:\n{self._last_words()}")
            if time.monotonic() - began > _READY_S:
                raise StackError(f"the daemon was not ready within {_READY_S:.0f} s:\n{self._last_words()}")
            time.sleep(_POLL_S)
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL the daemon, and nothing else: its PostgreSQL stays and the next start adopts it."""
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """End the daemon in order; a PostgreSQL that outlived it too."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._reap()
        if self._postmaster_lives():
            # joining it and leaving it again stops it: nobody else uses it
            embedded.start(self.data_dir).stop()

    def _reap(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
            raise StackError(f"the daemon did not end within {_STOP_S:.0f} s:\n{self._last_words()}") from None
        finally:
            self._process = None

    def ready(self) -> bool:
        """Whether it says that it can commit."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-20:])

    # ── its command line, database and keys ──────────────────────────────────────────────────────────────

    def import_fleet(self, fleet: Sequence[Device]) -> None:
        """Make the devices known, by the command that an operator would use."""
        file = self.folder / "fleet.csv"
        file.touch(mode=0o600)
        with file.open("w", encoding="utf-8", newline="") as out:
            write_csv(fleet, out)
        counts = self.command("devices", "import", str(file), "--json", timeout_s=_IMPORT_S)
        if counts["rows"] != len(fleet):
            raise StackError(f"{len(fleet)} devices were to be imported, not {counts}")

    def command(self, *words: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """What a `nexhb … --json` beside the daemon answers."""
        done = subprocess.run(
            [*self._command(), *words], env=self._environment(), capture_output=True, timeout=timeout_s, check=False
        )
        if done.returncode != 0:
            raise StackError(f"nexhb {' '.join(words)} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
        found: dict[str, Any] = orjson.loads(done.stdout)
        return found

    def post(self, path: str, *, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """What POST `path` answers to the operator: status and JSON."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=timeout_s)
        try:
            connection.request("POST", path, headers={"x-admin": self.admin_key})
            answer = connection.getresponse()
            found: dict[str, Any] = orjson.loads(answer.read())
            return answer.status, found
        finally:
            connection.close()

    def metrics(self) -> Scrape:
        """What GET /metrics says now."""
        return parse(self.get("/metrics").decode())

    def get(self, path: str) -> bytes:
        """What GET `path` answers to the operator. Raises StackError unless that is a 200."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=30)
        try:
            connection.request("GET", path, headers={"x-admin": self.admin_key})
            answer = connection.getresponse()
            found = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise StackError(f"GET {path} was answered {answer.status}: {found[:500]!r}")
        return found

    def events(self) -> list[dict[str, Any]]:
        """What the daemon has logged, oldest first."""
        found = []
        for line in self.log_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):
                found.append(orjson.loads(line))
        return found

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "nexhb", "--config", str(self._config)]

    def _environment(self) -> dict[str, str]:
        """Ours, without what would configure nexhb or PostgreSQL's client."""
        aliases = {"DATABASE_URL", "ADMIN_KEY", "READ_FROM_LAST_STATUS", "PERF_DIFF_ENABLED", "STATE_DIRECTORY"}
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("NEXHB_", "PG")) and k not in aliases}
        where = {"NEXHB_DATA_DIR": str(self.data_dir), "NEXHB_SERVER__PORT": str(self.port)}
        if self._shared_port is not None:
            where |= {
                "NEXHB_SERVER__PORT": str(self._shared_port),
                "NEXHB_SERVER__INSTANCE_PORT": str(self.port),
                "NEXHB_SERVER__REUSE_PORT": "true",
            }
        # the checkout that this bench belongs to, whatever the working directory
        return (
            ours | where | _NO_SCHEDULE | self._settings | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        )

    @property
    def admin_key(self) -> str:
        """The key that the daemon made at its first start."""
        return (self.data_dir / keys.FILE).read_text(encoding="ascii").strip()

    @property
    def postmaster_pid(self) -> int:
        """The embedded PostgreSQL's first process."""
        return int(self._postmaster_file()[0])

    def program(self, name: str) -> Path:
        """A program of the embedded PostgreSQL, from the folder that its server runs out of."""
        return Path("/proc", str(self.postmaster_pid), "exe").resolve().with_name(name)

    @property
    def dsn(self) -> str:
        """How to reach its PostgreSQL: the one it was told of, or the embedded one, by the socket that it names."""
        if told := self._settings.get(DATABASE_URL):
            return told
        socket_dir = self._postmaster_file()[4]
        return f"postgresql://{USER}@/{USER}?host={quote(socket_dir)}&port=5432"

    def dsn_of(self, database: str) -> str:
        """How to reach another database of the same PostgreSQL."""
        head, _, query = self.dsn.partition("?")
        return f"{head.rpartition('/')[0]}/{database}?{query}"

    async def connect(self, database: str | None = None) -> asyncpg.Connection:
        """A connection of one's own to the daemon's database, or to another one of its PostgreSQL."""
        return await connect(self.dsn if database is None else self.dsn_of(database))

    def memory(self) -> Memory:
        """The daemon's memory, PostgreSQL's not counted."""
        return memory_of(self.pid)

    def _postmaster_file(self) -> list[str]:
        return (self.data_dir / "pg" / "postmaster.pid").read_text(encoding="utf-8").splitlines()

    def _postmaster_lives(self) -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return Path("/proc", str(self.postmaster_pid), "cwd").samefile(self.data_dir / "pg")
        return False


@contextlib.contextmanager
def running(
    fleet: Sequence[Device] = (), *, data_dir: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """A daemon that serves and knows the fleet. Its folder goes with it, unless it is a named one."""
    with run_folder(data_dir) as folder:
        stack = Stack(folder, settings or {})
        try:
            stack.start()
            if fleet:
                stack.import_fleet(fleet)
            yield stack
        finally:
            stack.stop()


@contextlib.contextmanager
def run_folder(named: Path | None = None) -> Iterator[Path]:
    """An empty folder: the named one, which stays, or one that goes."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        if any(named.iterdir()):
            raise StackError(f"{named} is not empty: a run is checked row by row, so it begins without any")
        yield named.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="nexhb-bench-"))
    try:
        if os.geteuid() == 0:
            # PostgreSQL runs as a system user then, who must be able to pass through
            made.chmod(0o711)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
