"""A daemon of a run: a separate process, which is restarted whenever it exits, as an init system would do."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from bench import process
from tests.faults.guard import Guard
from tests.faults.processes import wait_for_exit
from tests.support import forks

ADMIN_KEY = "admin-key-of-the-fault-machine"
_HEADERS = {"x-admin": ADMIN_KEY}
RESTART_DELAY_S = 0.2  # between the exit of the process and its next start
STOP_S = 40.0  # limit for the requests in flight and the writer's drain, with a margin
SETTINGS = {
    "NEXHB_AUTH__ADMIN_KEY": ADMIN_KEY,
    "NEXHB_JOBS__NIGHTLY": "",
    "NEXHB_JOBS__RECONCILE": "",
    "NEXHB_AUTH__FAILURES_PER_MINUTE": "100000",  # a limit per address, which all devices share
    "NEXHB_INGEST__ANSWER_WITHIN_SECONDS": "3",  # the default of 10, scaled down like the devices' timeout
    "NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000",  # devices send every tenth of a second, not every minute
    "NEXHB_SERVER__SHUTDOWN_TIMEOUT_SECONDS": "5",
}


class Daemon(process.Daemon):
    """One daemon, identified by its port. Its process may be restarted, and then has another process ID."""

    def __init__(self, folder: Path, guard: Guard, settings: Mapping[str, str], entry: tuple[str, ...]) -> None:
        super().__init__(folder, SETTINGS | dict(settings), entry=entry, start=forks.popen)
        self.logs_to = self.log_path  # where stderr goes from the next start on
        self.commands_log_path = folder / "commands.log"
        self.starts = 0
        self.ended_by_itself: list[int] = []  # exit codes of processes that exited without a signal from a fault
        self._guard = guard
        self._process: process.Process | None = None
        self._may_run = asyncio.Event()
        self._started = asyncio.Condition()
        self._exit_is_intended = False

    @property
    def logs(self) -> list[Path]:
        """The log files of the daemon and of the commands that were run beside it."""
        return [path for path in (self.log_path, self.commands_log_path) if path.exists()]

    @property
    def is_running(self) -> bool:
        """Whether the daemon has a running process."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The ID of the daemon's process; 0 if none is running."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[Daemon]:
        """For the block, start the daemon whenever it may run and is not running; kill it afterwards."""
        supervisor = asyncio.create_task(self._supervise())
        try:
            yield self
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            if self._process is not None:
                self._process.kill()
                self._process.wait(10)

    def keep_running(self) -> None:
        """Keep the daemon running from now on."""
        self._may_run.set()

    def send_signal(self, number: signal.Signals) -> bool:
        """Send the daemon a signal; return False if it is not running."""
        if self._process is None or self._process.returncode is not None:
            return False
        self._exit_is_intended = self._exit_is_intended or number in (signal.SIGKILL, signal.SIGTERM)
        self._process.send_signal(number)
        return True

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """End the daemon and do not restart it. Return its exit code, or None if it had to be killed after STOP_S
        seconds; 0 if it was not running."""
        self._may_run.clear()
        running = self._process
        if running is None or not self.send_signal(number):
            return 0
        try:
            async with asyncio.timeout(STOP_S):
                await wait_for_exit(running.pid)
        except TimeoutError:
            running.kill()
            await wait_for_exit(running.pid)
            return None
        return running.wait()

    async def wait_for_restart(self, starts: int, timeout_s: float) -> None:
        """Wait until the daemon was started more than `starts` times (at most STOP_S seconds) and is ready (at most
        `timeout_s` seconds)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S), self._started:
                await self._started.wait_for(lambda: self.starts > starts)
        await self.ready(timeout_s)

    async def ready(self, timeout_s: float) -> float | None:
        """Wait until the daemon can commit. Return how many seconds that took, or None if it took more than `timeout_s`
        seconds."""
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as http:
                while not await self._is_ready(http):
                    await asyncio.sleep(0.03)
                return time.monotonic() - began
        return None

    async def _is_ready(self, http: aiohttp.ClientSession) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with http.get(f"{self.url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as response:
                return response.status == 200
        return False

    async def reasons(self) -> str:
        """Return the text of the daemon's readiness response; empty if it does not respond."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2), headers=_HEADERS) as http,
                http.get(f"{self.url}/readyz") as response,
            ):
                return await response.text()
        return ""

    async def post(self, path: str, timeout_s: float = 30.0) -> int:
        """Send an operator's request. Return the status of the response, or 0 if there was none."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s), headers=_HEADERS) as http,
                http.post(self.url + path) as response,
            ):
                return response.status
        return 0

    async def metrics(self) -> dict[str, float]:
        """Return the sum of the samples of each metric."""
        sums: dict[str, float] = {}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), headers=_HEADERS) as http,
            http.get(f"{self.url}/metrics") as response,
        ):
            text = await response.text()
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def begin(self, *words: str, **settings: str) -> process.Process:
        """Start a command of nexhb with the daemon's settings, and return its process."""
        started = self.spawn(*words, log=self.commands_log_path, **settings)
        self._guard.report("child", started.pid)
        return started

    async def _supervise(self) -> None:
        while True:
            await self._may_run.wait()
            self._spawn()
            async with self._started:
                self._started.notify_all()
            assert self._process is not None
            await wait_for_exit(self._process.pid)
            code = self._process.wait()
            self._guard.report("ended", self._process.pid)
            if not self._exit_is_intended:
                self.ended_by_itself.append(code)
            await asyncio.sleep(RESTART_DELAY_S)

    def _spawn(self) -> None:
        self._exit_is_intended = False
        self.starts += 1
        self._process = self.spawn("serve", log=self.logs_to)
        self._guard.report("child", self._process.pid)
