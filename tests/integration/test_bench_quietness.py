"""Formerly, bench reported every archive scenario as "not quiet", because it counted only the CPU time of processes
that still ran at the end. The CPU time of PostgreSQL's sessions that had ended by then counted as that of other
programs. The kernel adds the CPU time of ended sessions to the times of the process that waited for them."""

from __future__ import annotations

import subprocess
import sys

from bench.cost import process_cpu_s, tree_cpu_s

_BURNS = "import time\nwhile time.process_time() < 0.3: pass"
_WAITS = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BURNS!r}])\nprint(flush=True)\ninput()"


def test_the_tree_has_the_time_of_a_child_that_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", _WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        own_s, tree_s = process_cpu_s(parent.pid), tree_cpu_s(parent.pid)
        parent.communicate(b"\n")
    assert tree_s - own_s >= 0.25
