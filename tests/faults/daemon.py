"""A daemon of a run: a process of its own, started again whenever it ends, as an init system would."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from bench.stack import free_port
from tests.faults.guard import Guard
from tests.faults.processes import ended

ROOT = Path(__file__).parent.parent.parent
ADMIN_KEY = "admin-key-of-the-fault-machine"
_KEY = {"x-admin": ADMIN_KEY}
AGAIN_S = 0.2  # between an end and the next start
STOP_S = 40.0  # requests under way, the writer's drain, and some more
SETTINGS = {
    "NEXHB_AUTH__ADMIN_KEY": ADMIN_KEY,
    "NEXHB_JOBS__NIGHTLY": "",
    "NEXHB_JOBS__RECONCILE": "",
    "NEXHB_AUTH__FAILURES_PER_MINUTE": "100000",  # one address has them all
    "NEXHB_INGEST__ANSWER_WITHIN_SECONDS": "3",  # 10, scaled as the devices' patience is
    "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000",  # a device's minute lasts a tenth of a second
    "NEXHB_SERVER__SHUTDOWN_TIMEOUT_SECONDS": "5",
}


class Daemon:
    """One daemon, by its port: who it is may change."""

    def __init__(self, folder: Path, guard: Guard, settings: Mapping[str, str], command: tuple[str, ...]) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "daemon.log"
        self.logs_to = self.log_path  # its stderr, from the next start on
        self.commands_log_path = folder / "commands.log"
        self.command = command
        self.starts = 0
        self.ended_by_itself: list[int] = []  # exit codes that nobody had asked for
        self._guard = guard
        self._environment = _environment() | {
            "NEXHB_DATA_DIR": str(folder / "data"), "NEXHB_SERVER__PORT": str(self.port), **SETTINGS, **settings,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = asyncio.Event()
        self._started = asyncio.Condition()
        self._expected = False  # its next end is somebody's will
        (folder / "nexhb.toml").touch()

    @property
    def logs(self) -> list[Path]:
        """What it and the commands beside it have logged."""
        return [path for path in (self.log_path, self.commands_log_path) if path.exists()]

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process; 0 where there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Daemon]:
        """For the block it is started whenever it is wanted and not there."""
        keeper = asyncio.create_task(self._keep())
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            if self._process is not None:
                self._process.kill()
                self._process.wait(10)

    def want(self) -> None:
        """From now on it is to run."""
        self._wanted.set()

    def send_signal(self, number: signal.Signals) -> bool:
        """Send it a signal; False where there is no process."""
        if self._process is None or self._process.returncode is not None:
            return False
        self._expected = self._expected or number in (signal.SIGKILL, signal.SIGTERM)
        self._process.send_signal(number)
        return True

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """End it and keep it so; its exit code, None where it had to be killed in the end."""
        self._wanted.clear()
        process = self._process
        if process is None or not self.send_signal(number):
            return 0
        try:
            async with asyncio.timeout(STOP_S):
                await ended(process.pid)
        except TimeoutError:
            process.kill()
            await ended(process.pid)
            return None
        return process.wait()

    async def comes_back(self, starts: int, bound_s: float) -> None:
        """Wait until it was started more than `starts` times, and is ready; not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S), self._started:
                await self._started.wait_for(lambda: self.starts > starts)
        await self.ready(bound_s)

    async def ready(self, bound_s: float) -> float | None:
        """Wait until it can commit; the seconds that took, None where it took more than `bound_s`."""
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(bound_s), aiohttp.ClientSession() as http:
                while not await self._is_ready(http):
                    await asyncio.sleep(0.03)
                return time.monotonic() - began
        return None

    async def _is_ready(self, http: aiohttp.ClientSession) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with http.get(f"{self.url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
                return answer.status == 200
        return False

    async def reasons(self) -> str:
        """What it says of its readiness; empty where it does not answer."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2), headers=_KEY) as http,
                http.get(f"{self.url}/readyz") as answer,
            ):
                return await answer.text()
        return ""

    async def post(self, path: str, bound_s: float = 30.0) -> int:
        """The status of an operator's call, 0 where there was no answer."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=bound_s), headers=_KEY) as http,
                http.post(self.url + path) as answer,
            ):
                return answer.status
        return 0

    async def metrics(self) -> dict[str, float]:
        """Each metric, its samples added up."""
        found: dict[str, float] = {}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), headers=_KEY) as http,
            http.get(f"{self.url}/metrics") as answer,
        ):
            text = await answer.text()
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def run(self, *words: str, **settings: str) -> subprocess.Popen[bytes]:
        """A command beside it, started."""
        with self.commands_log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self.command, "--config", str(self.folder / "nexhb.toml"), *words],
                env=self._environment | settings, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._guard.tell("child", process.pid)
        return process

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            self._spawn()
            async with self._started:
                self._started.notify_all()
            assert self._process is not None
            await ended(self._process.pid)
            code = self._process.wait()
            self._guard.tell("ended", self._process.pid)
            if not self._expected:
                self.ended_by_itself.append(code)
            await asyncio.sleep(AGAIN_S)

    def _spawn(self) -> None:
        self._expected = False
        self.starts += 1
        with self.logs_to.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self.command, "--config", str(self.folder / "nexhb.toml"), "serve"],
                env=self._environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._guard.tell("child", self._process.pid)


def _environment() -> dict[str, str]:
    """Ours, without what would configure nexhb or PostgreSQL's client; and this checkout, wherever we are."""
    aliases = {"DATABASE_URL", "ADMIN_KEY", "READ_FROM_LAST_STATUS", "PERF_DIFF_ENABLED", "STATE_DIRECTORY"}
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("NEXHB_", "PG")) and k not in aliases}
    return ours | {"PYTHONPATH": str(ROOT)}
