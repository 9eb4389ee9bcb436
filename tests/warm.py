"""nexhb's commands without the second that Python takes to import them: a process that has imported all forks for each.

`shim` is a script that stands for `nexhb` on a PATH. It leaves its id, arguments and environment, and ends as the fork
does, which has its folder and its standard output and error.
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

# /bin/echo, since bash's own would have the pipe as its standard output when the fork looks for that.
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
    """Make the script at `path` and run the process behind it for the block; `folder` is theirs."""
    folder.mkdir()
    os.mkfifo(folder / "calls")
    path.write_text(_SHIM.format(folder=folder))
    path.chmod(0o755)
    process = subprocess.Popen([sys.executable, "-m", "tests.warm", str(folder)], cwd=Path(__file__).parents[1])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _serve(folder: Path) -> None:
    """Fork for each call. Both ends of the pipe are held open, so that its end never comes."""
    from nexhb import cli  # noqa: PLC0415 - here, so that the tests themselves need not import it

    cli.register()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with os.fdopen(os.open(folder / "calls", os.O_RDWR)) as calls:
        for line in calls:
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run(folder, line.strip())


def _run(folder: Path, call: str) -> None:
    """One call. Never returns."""
    from nexhb.__main__ import main  # noqa: PLC0415

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
