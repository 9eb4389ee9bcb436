"""Started by an ordinary user the daemon had 1,024 open files, and of 2,000 devices every second one found its line
cut. It takes the hard limit now. `make demo` on a bare Debian found it; as root the limit is high."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
from nexhb import daemon, log
log.setup("warning")
daemon.raise_open_files_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_daemon_takes_as_many_open_files_as_it_may_have() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2048"
    assert "LimitNOFILE" in done.stderr
