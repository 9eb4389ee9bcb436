"""What a run costs: CPU seconds of the generator and of the server, resident memory of a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean
from typing import Final, NamedTuple

# samples at either end of a stretch
_AVERAGED: Final = 6


def own_cpu_s() -> float:
    """CPU seconds this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine_cpu_s() -> float:
    """CPU seconds that all processes of this machine have used, and those that it wanted while the host gave them to
    other guests ("steal"); 0 where it cannot be told."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = (int(field) for field in line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float | None:
    """CPU seconds process `pid` has used, without its children; None when it is gone."""
    stat = _stat(pid)
    return None if stat is None else stat.cpu_s


def tree_cpu_s(pid: int) -> float | None:
    """CPU seconds of `pid` and every descendant, those that ended too: a daemon with its embedded PostgreSQL, whose
    sessions and autovacuum workers come and go."""
    stats = {int(p.name): stat for p in Path("/proc").iterdir() if p.name.isdigit() and (stat := _stat(int(p.name)))}
    if pid not in stats:
        return None
    children: dict[int, list[int]] = {}
    for child, stat in stats.items():
        children.setdefault(stat.parent, []).append(child)
    total, todo = 0.0, [pid]
    while todo:
        at = todo.pop()
        total += stats[at].cpu_s + stats[at].reaped_s
        todo.extend(children.get(at, ()))
    return total


@dataclass(frozen=True, slots=True)
class _Stat:
    """What is wanted of /proc/PID/stat."""

    parent: int
    cpu_s: float
    # of children that ended and were waited for, and of theirs
    reaped_s: float


def _stat(pid: int) -> _Stat | None:
    """Read /proc/PID/stat; None when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name in parentheses may itself hold spaces and parentheses
    fields = text[text.rindex(")") + 2 :].split()
    own, reaped = (sum(map(int, fields[at : at + 2])) / os.sysconf("SC_CLK_TCK") for at in (11, 13))
    return _Stat(int(fields[1]), own, reaped)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds used over a stretch of a run; the server's are None without its pid."""

    generator_s: float
    server_s: float | None = None
    server_tree_s: float | None = None
    # of all processes of the machine, and the clock
    machine_s: float = 0.0
    at_s: float = 0.0
    # of what runs beside the server and belongs to the run: a peer's PostgreSQL (nexhb's child), who asks meanwhile
    beside_s: float = 0.0

    def since(self, earlier: Cost) -> Cost:
        """What was used between two readings."""
        return Cost(
            self.generator_s - earlier.generator_s,
            _minus(self.server_s, earlier.server_s),
            _minus(self.server_tree_s, earlier.server_tree_s),
            self.machine_s - earlier.machine_s,
            self.at_s - earlier.at_s,
            round(self.beside_s - earlier.beside_s, 3),
        )

    @property
    def others_cores(self) -> float | None:
        """How many cores were busy with something else, or taken by the host: figures of a machine that was not quiet
        say little."""
        if self.server_tree_s is None or self.at_s <= 0:
            return None
        return round(max(0.0, self.machine_s - self.generator_s - self.server_tree_s - self.beside_s) / self.at_s, 2)


def _minus(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else round(now - before, 3)


def cost_now(pid: int | None, beside: int | None = None) -> Cost:
    """Read the CPU clocks of this process and, with a pid, of the server; `beside` with its descendants apart."""
    server_s, tree_s = (None, None) if pid is None else (process_cpu_s(pid), tree_cpu_s(pid))
    beside_s = 0.0 if beside is None else tree_cpu_s(beside) or 0.0
    return Cost(own_cpu_s(), server_s, tree_s, machine_cpu_s(), time.monotonic(), beside_s)


class PerHeartbeat(NamedTuple):
    """CPU µs that one heartbeat took."""

    daemon_us: float
    postgres_us: float


def per_heartbeat(cost: Cost, sends: int) -> PerHeartbeat:
    """Of a stretch with so many sends. PostgreSQL is the daemon's child, so the tree's CPU less its own; or beside."""
    daemon_s, tree_s = cost.server_s or 0.0, cost.server_tree_s or 0.0
    micros = 1e6 / max(1, sends)
    return PerHeartbeat(round(daemon_s * micros, 1), round((tree_s - daemon_s + cost.beside_s) * micros, 1))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Memory:
    """A process' resident memory in MB (10^6 bytes), now and at its highest."""

    rss_mb: float
    peak_mb: float


def memory_of(pid: int) -> Memory:
    """Read VmRSS and VmHWM. Raises OSError when the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key[:2] == "Vm"}
    return Memory(round(kib["VmRSS"] * 1024 / 1e6, 1), round(kib["VmHWM"] * 1024 / 1e6, 1))


def forget_peak(pid: int) -> None:
    """Let VmHWM begin anew, at what is resident now: a peak that falls between two looks is seen all the same."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


class Sample(NamedTuple):
    """Resident memory at an instant of the run."""

    at_s: float
    rss_mb: float


@contextlib.asynccontextmanager
async def watched(pid: int, every_s: float) -> AsyncIterator[list[Sample]]:
    """The memory of process `pid` while the block runs, looked at so often; a look takes 0.1 ms."""
    samples: list[Sample] = []
    began = time.monotonic()

    async def look() -> None:
        while True:
            samples.append(Sample(round(time.monotonic() - began, 2), memory_of(pid).rss_mb))
            await asyncio.sleep(every_s)

    looking = asyncio.create_task(look())
    try:
        yield samples
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


def growth_of(samples: Sequence[Sample]) -> float:
    """MB between the first six samples and the last six, each averaged."""
    first, last = samples[:_AVERAGED], samples[-_AVERAGED:]
    return round(mean(each.rss_mb for each in last) - mean(each.rss_mb for each in first), 2)


def trend_of(samples: Sequence[Sample]) -> float:
    """MB that a straight line through all samples rises by."""
    slope, _ = linear_regression([each.at_s for each in samples], [each.rss_mb for each in samples])
    return round(slope * (samples[-1].at_s - samples[0].at_s), 2)
