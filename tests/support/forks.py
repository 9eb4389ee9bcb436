"""Start nexhb's processes as forks of a process that has imported nexhb already: 0.05 s of CPU instead of 0.7 s.

`start` and `run` correspond to subprocess.Popen and subprocess.run of `python -m MODULE WORDS…`. The fork has the given
environment, folder, standard files and session; it then runs the module as `python -m` does, and ends as any
interpreter ends. A real start is needed where a test is about imports, or about what only the start of an interpreter
reads (`_AT_THE_START`), and for another user, a resource limit or a library to preload.

The process that forks is called the server. The tests' process starts one server, with the first fork; the server ends
with the tests' process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import orjson

from bench import process
from bench.process import ROOT

_AT_THE_START = ("LD_PRELOAD", "LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONWARNINGS")
_REQUEST_BYTES = 1 << 17  # limit for words, folder and environment; a datagram may have 200 kB
_FILES = 4  # descriptors in a request: the pipe for reports, stdin, stdout, stderr


class Process:
    """A fork, with the methods of subprocess.Popen that tests use: `stderr` is set if it is a pipe."""

    def __init__(self, reports: int, stderr: IO[str] | None) -> None:
        """Take the descriptor on which the server reports the fork's id, and at its end its exit code."""
        self._open = {reports}
        self._reports = reports
        self.returncode: int | None = None
        self.stderr = stderr
        self.pid = self._report()
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):  # the process may have exited already
            self._handle = os.pidfd_open(self.pid)
            self._open.add(self._handle)

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._reports, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("nexhb", timeout or 0)
            self.returncode = self._report()
            self._close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; do nothing if the process has ended."""
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stderr is not None:
            self.stderr.close()
        self.wait()

    def __del__(self) -> None:
        self._close()

    def _report(self) -> int:
        report = os.read(self._reports, 8)
        if not report:
            raise RuntimeError("the server of the forks has ended")
        return int.from_bytes(report, "little", signed=True)

    def _close(self) -> None:
        self._handle = None
        while self._open:
            os.close(self._open.pop())


def start(
    module: str,
    words: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    start_new_session: bool = False,
) -> Process:
    """Start `python -m MODULE WORDS…`. The files are descriptors, subprocess.DEVNULL, or None for the caller's own;
    stderr can be subprocess.PIPE."""
    environment = dict(os.environ if env is None else env)
    for name in _AT_THE_START:
        if environment.get(name, os.environ.get(name)) != os.environ.get(name):
            raise ValueError(f"a fork cannot have its own {name}, which is read at the start of an interpreter")
    call = orjson.dumps((module, words, environment, str(cwd or Path.cwd()), start_new_session))
    if len(call) > _REQUEST_BYTES:
        raise ValueError(f"{len(call)} bytes are too much for a call")
    with contextlib.ExitStack() as cleanup:
        pipe: IO[str] | None = None
        if stderr == subprocess.PIPE:
            end, stderr = os.pipe()
            cleanup.callback(os.close, stderr)
            pipe = os.fdopen(end, encoding="utf-8")
        null_device = os.open(os.devnull, os.O_RDWR)
        cleanup.callback(os.close, null_device)
        reports, reporter = os.pipe()
        cleanup.callback(os.close, reporter)
        files = [null_device if one == subprocess.DEVNULL else own if one is None else one
                 for own, one in enumerate((stdin, stdout, stderr))]  # fmt: skip
        if stderr == subprocess.STDOUT:
            files[2] = files[1]
        socket.send_fds(_server(), [call], [reporter, *files])
    return Process(reports, pipe)


def popen(argv: Sequence[str], **options: Any) -> Process:
    """Start `[python, "-m", MODULE, WORDS…]`, with the options that `start` knows: for bench.process.launch."""
    if tuple(argv[:2]) != (sys.executable, "-m"):
        raise ValueError(f"not a module of this Python: {argv}")
    return start(argv[2], argv[3:], **options)


def run(
    module: str,
    words: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE WORDS…` without input to its end, and return its exit code and output; stderr can be
    subprocess.STDOUT. Raises subprocess.TimeoutExpired, and with `check` subprocess.CalledProcessError."""
    argv = [sys.executable, "-m", module, *words]
    done = process.run(argv, env=os.environ if env is None else env, timeout_s=timeout, start=popen, **options)
    if check:
        done.check_returncode()
    return done


@functools.cache
def _server() -> socket.socket:
    """Start the server, and return the socket on which it receives calls; the server ends when this socket is
    closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal must not reach it
        )  # fmt: skip

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# ── the server's side ────────────────────────────────────────────────────────────────────────────────────


def _serve(calls: socket.socket) -> str:
    """Fork for each call. Return in the fork alone, with the name of the module to run; the server never returns."""
    from nexhb import cli  # noqa: PLC0415 - the tests' own process need not import every command

    cli.register()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("an import has started a thread, which a fork would lack")
    gc.collect()
    gc.freeze()  # garbage collection in the forks leaves the memory that they share alone
    events = selectors.DefaultSelector()
    events.register(calls, selectors.EVENT_READ)
    forks: dict[int, tuple[int, int]] = {}  # pidfd → process id, where to report its end
    while True:
        for key, _ in events.select():
            if key.fd in forks:
                events.unregister(key.fd)
                _report_end(key.fd, *forks.pop(key.fd))
                continue
            call, received, _, _ = socket.recv_fds(calls, _REQUEST_BYTES, _FILES)
            if not call:
                os._exit(0)
            reporter, *files = received
            if not (pid := os.fork()):
                for descriptor in (*forks, *(report for _, report in forks.values()), reporter):
                    os.close(descriptor)
                events.close()
                calls.close()
                return _become(call, files)
            _report(reporter, pid)
            handle = os.pidfd_open(pid)
            forks[handle] = pid, reporter
            events.register(handle, selectors.EVENT_READ)
            for file in files:
                os.close(file)


def _become(call: bytes, files: Sequence[int]) -> str:
    """Give this process what the caller asked for, and return the name of the module to run."""
    module, words, environment, folder, start_new_session = orjson.loads(call)
    if start_new_session:
        os.setsid()
    for number, name, file in zip(range(3), ("stdin", "stdout", "stderr"), files, strict=True):
        os.dup2(file, number)
        os.close(file)
        before = getattr(sys, name)  # the old stream may mistake a pipe for a file
        stream = open(  # noqa: SIM115 - a descriptor, open until the exit
            number, "w" if number else "r", 1 if number == 2 else -1, before.encoding, before.errors, closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.argv = [module, *words]
    return str(module)


def _report(reporter: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the report any more
        os.write(reporter, number.to_bytes(8, "little", signed=True))


def _report_end(handle: int, pid: int, reporter: int) -> None:
    _, status = os.waitpid(pid, 0)
    _report(reporter, os.waitstatus_to_exitcode(status))
    os.close(handle)
    os.close(reporter)


if __name__ == "__main__":
    runpy.run_module(_serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
