"""A script that stands for `nexhb` on a PATH, for tests that run shell commands: it calls a fork (see forks.py).

The script writes its arguments and its environment into files that are named by its process id, and exits with the
fork's exit code. The fork has the script's folder, standard output and standard error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.support import forks

# /bin/echo, because while a builtin of bash writes, the standard output of bash is the pipe, and the fork would open
# this pipe.
_SHIM = """#!/bin/bash
cd -P . && call={folder}/$$
printf '%s\\0' "$PWD" "$@" > "$call.words"
env -0 > "$call.env"
mkfifo "$call.code"
/bin/echo $$ > {folder}/calls
read -r code < "$call.code"
exit "$code"
"""


@contextlib.contextmanager
def shim(path: Path, folder: Path) -> Iterator[None]:
    """Write the script at `path`, and run its process for the block; both use `folder`."""
    folder.mkdir()
    os.mkfifo(folder / "calls")
    path.write_text(_SHIM.format(folder=folder))
    path.chmod(0o755)
    process = forks.start("tests.support.shim", [str(folder)], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _serve(folder: Path) -> None:
    """Fork for each call. This process keeps both ends of the pipe open, so that it never reads an end of file."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the forks
    with os.fdopen(os.open(folder / "calls", os.O_RDWR)) as calls:
        for line in calls:
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run(folder, line.strip())


def _run(folder: Path, call: str) -> None:
    """Run one call. Never returns."""
    from nexhb.__main__ import main  # noqa: PLC0415 - the tests' own process need not import it

    code: object = 70
    try:
        where, *words = (folder / f"{call}.words").read_text().split("\0")[:-1]
        os.environ.clear()
        for entry in (folder / f"{call}.env").read_text().split("\0")[:-1]:
            name, _, value = entry.partition("=")
            os.environ[name] = value
        os.chdir(where)
        for number in (1, 2):
            os.dup2(os.open(f"/proc/{call}/fd/{number}", os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["nexhb", *words]
        main()
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else 1
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / f"{call}.code").write_text(f"{code}\n")
        os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
