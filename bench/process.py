"""A process of nexhb: its folder, its port, its settings, and how it is started.

`bench.stack` and the tests' harnesses build on this module. It is in bench, since bench must run without the tests. A
test replaces `launch` by a function that starts processes faster (tests/support/forks.py).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

ROOT: Final = Path(__file__).resolve().parent.parent
HOST: Final = "127.0.0.1"
# below the kernel's ephemeral range, so that no connection of a client gets the daemon's port while the daemon is not
# running
_PORTS: Final = (20_000, 32_000)


class Process(Protocol):
    """The part of subprocess.Popen that is needed."""

    @property
    def pid(self) -> int:
        """Return the process id."""

    @property
    def returncode(self) -> int | None:
        """Return the exit code as of the last `poll` or `wait`; None before the end."""

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal; do nothing if the process has ended."""

    def kill(self) -> None:
        """Send SIGKILL."""


Launch = Callable[..., Process]  # with the arguments of subprocess.Popen
launch: Launch = subprocess.Popen


def run(
    argv: Sequence[str], *, env: Mapping[str, str], timeout_s: float, start: Launch | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program without input to its end; return its exit code and output. `options` are those of Popen; stderr can
    be subprocess.STDOUT. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = {"stdin": subprocess.DEVNULL, "stdout": out.fileno(), "stderr": err.fileno()}
        process = (start or launch)(argv, env=env, **files | options)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(argv, code, *texts)


def free_port() -> int:
    """Return a port on which no process listens."""
    rng = random.Random(os.urandom(8))
    for _ in range(100):
        port = rng.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise OSError(f"no free port between {_PORTS[0]} and {_PORTS[1]}")


def environment() -> dict[str, str]:
    """Return this process's environment without the variables that configure nexhb or PostgreSQL's client, and with
    this checkout in PYTHONPATH, so that it is imported from any working directory."""
    aliases = {"DATABASE_URL", "ADMIN_KEY", "READ_FROM_LAST_STATUS", "PERF_DIFF_ENABLED", "STATE_DIRECTORY"}
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("NEXHB_", "PG")) and k not in aliases}
    return ours | {"PYTHONPATH": str(ROOT)}


class Daemon:
    """One daemon, identified by its folder and its port: its process may be replaced by another."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        *,
        entry: Sequence[str] = ("nexhb",),
        start: Launch | None = None,
    ) -> None:
        """Prepare in an existing folder. `settings` are NEXHB_… variables, `entry` is the module that is run, with its
        first arguments, and `start` the function that starts processes, by default `launch`."""
        self.folder = folder
        self.settings = dict(settings)
        self.entry = tuple(entry)
        self.data_dir = folder / "data"
        self.log_path = folder / "daemon.log"
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._start = start
        self._config = folder / "nexhb.toml"
        # an empty file: neither the caller's ./nexhb.toml nor /etc/nexhb/nexhb.toml is read
        self._config.touch()

    def environment(self) -> dict[str, str]:
        """Return the environment of the daemon and of the commands beside it."""
        own = {"NEXHB_DATA_DIR": str(self.data_dir), "NEXHB_SERVER__PORT": str(self.port)}
        return environment() | own | self.settings

    def argv(self, *words: str) -> list[str]:
        """Return the program and arguments that run nexhb with these words."""
        module, *first = self.entry
        return [sys.executable, "-m", module, *first, "--config", str(self._config), *words]

    def spawn(self, *words: str, log: Path, **settings: str) -> Process:
        """Start nexhb with these words; its output is appended to the log."""
        with log.open("ab") as file:
            return (self._start or launch)(
                self.argv(*words),
                env=self.environment() | settings,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file.fileno(),
                stderr=file.fileno(),
                # Ctrl-C must reach the caller only, which then stops the daemon in an orderly way
                start_new_session=True,
            )

    def run(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command of nexhb beside the daemon; return its exit code and output."""
        return run(self.argv(*words), env=self.environment(), timeout_s=timeout_s, start=self._start, cwd=ROOT)
