"""The cost of a run: CPU seconds of the generator and of the server, resident memory of a process."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


def _stat(pid: int) -> tuple[int, float, float] | None:
    """Return a process's parent, its CPU seconds, and those of its descendants that ended and were waited for; None if
    the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name in parentheses may itself contain spaces and parentheses
    fields = text[text.rindex(")") + 2 :].split()
    own_s, reaped_s = (sum(map(int, fields[at : at + 2])) / os.sysconf("SC_CLK_TCK") for at in (11, 13))
    return int(fields[1]), own_s, reaped_s


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds of process `pid` without its children; NaN if it has ended."""
    stat = _stat(pid)
    return math.nan if stat is None else stat[1]


def tree_cpu_s(pid: int) -> float:
    """Return the CPU seconds of process `pid` and of all its descendants, including those that have ended: the sessions
    and autovacuum workers of a daemon's embedded PostgreSQL come and go. NaN if the process has ended."""
    stats = {int(p.name): stat for p in Path("/proc").iterdir() if p.name.isdigit() and (stat := _stat(int(p.name)))}
    if pid not in stats:
        return math.nan
    children: dict[int, list[int]] = {}
    for child, (parent, _, _) in stats.items():
        children.setdefault(parent, []).append(child)
    total, todo = 0.0, [pid]
    while todo:
        at = todo.pop()
        total += sum(stats[at][1:])
        todo.extend(children.get(at, ()))
    return total


def machine_cpu_s() -> float:
    """Return the CPU seconds of all processes of this machine, plus those that its host gave to other guests."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """The time and the CPU seconds: a reading at a moment, or the difference of two readings. The server's CPU seconds
    are NaN if its processes are unknown."""

    at_s: float
    generator_s: float
    daemon_s: float
    postgres_s: float
    machine_s: float

    def since(self, earlier: Cost) -> Cost:
        """Return the time and CPU seconds between the earlier reading and this one."""
        return Cost(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def others_cores(self) -> float | None:
        """Return how many cores were busy with other work or taken by the host; None if the server's CPU seconds are
        unknown."""
        others_s = self.machine_s - self.generator_s - self.daemon_s - self.postgres_s
        return None if math.isnan(others_s) else round(max(0.0, others_s) / self.at_s, 2)


def cost_now(pids: Sequence[int] = (), beside: int | None = None) -> Cost:
    """Read the clocks of this process, of the server's processes, and of the machine. The descendants of the server,
    and process `beside` with its descendants, count as PostgreSQL."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    daemon_s = sum(map(process_cpu_s, pids)) if pids else math.nan
    postgres_s = sum(map(tree_cpu_s, pids)) - daemon_s + (0.0 if beside is None else tree_cpu_s(beside))
    return Cost(time.monotonic(), usage.ru_utime + usage.ru_stime, daemon_s, postgres_s, machine_cpu_s())


class Memory(NamedTuple):
    """The resident memory of a process in MB (10^6 bytes), now and at its peak."""

    rss_mb: float
    peak_mb: float


def memory_of(pid: int) -> Memory:
    """Read VmRSS and VmHWM. Raises OSError if the process has ended."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return Memory(*(round(int(fields[name].split()[0]) * 1024 / 1e6, 1) for name in ("VmRSS", "VmHWM")))


def forget_peak(pid: int) -> None:
    """Reset VmHWM to the memory that is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
