"""Resources that run out: inodes, open files, memory, and space on the disks of the log and the spool."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.kinds_processes import READY_S, end_and_wait, own_cluster
from tests.faults.kinds_tables import NIGHTLY_RUN_S, archive_days
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World

SPOOL_BYTES = "64k"
OPEN_FILES = 8  # the limit of open files, below the number that the daemon always has open
WAL_SEGMENTS = 12  # number of switches: more than the segments that PostgreSQL keeps for later use


async def _fill_inodes(world: World, fault: Fault) -> None:
    """Use up the inodes, and switch WAL segments: PostgreSQL can then create no partition, no temporary file, and no
    WAL segment, without which it cannot continue."""
    cluster = own_cluster(world)
    try:
        await asyncio.to_thread(cluster.fill_inodes)
        with suppress(*UNREACHABLE, TimeoutError):
            async with world.connection() as conn:
                for _ in range(WAL_SEGMENTS):
                    await conn.execute("SELECT pg_logical_emit_message(true, 'faults', ''), pg_switch_wal()")
        await asyncio.sleep(fault.duration_s)
    finally:
        await asyncio.to_thread(cluster.free_inodes)
    await world.daemons[0].ready(READY_S)


async def _fill_log_disk(world: World, fault: Fault) -> None:
    """Restart the daemon with a log to which no line can be written; it must serve nevertheless."""
    daemon = world.daemons[0]
    daemon.logs_to = Path("/dev/full")
    ends = len(daemon.ended_by_itself)
    try:
        if not daemon.send_signal(signal.SIGTERM):
            raise NotPossible("the daemon is not running")
        deadline = time.monotonic() + READY_S
        while await daemon.ready(1.0) is None and time.monotonic() < deadline:
            if len(daemon.ended_by_itself) > ends + 1:
                world.report("stuck", "the daemon exits repeatedly because the disk of its log is full")
                break
        await asyncio.sleep(fault.duration_s)
    finally:
        daemon.logs_to = daemon.log_path
        await end_and_wait(daemon, signal.SIGTERM)
        del daemon.ended_by_itself[ends:]  # exits at a start without a database, whose reason cannot be logged


@contextmanager
def _limited(pid: int, limit: int, value: int) -> Iterator[None]:
    """For the block, set the process's soft limit of a resource (resource.RLIMIT_…). Raises NotPossible."""
    if not pid:
        raise NotPossible("the daemon is not running")
    try:
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (value, before[1]))
    except (ProcessLookupError, PermissionError) as error:
        raise NotPossible(f"{error}") from error
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, limit, before)


async def _limit_open_files(world: World, fault: Fault) -> None:
    """Let the daemon open no more files, and cut its connections to the database, sometimes also those of devices: the
    daemon can open no new connection, while its remaining connections stay usable."""
    with _limited(world.daemons[0].pid, resource.RLIMIT_NOFILE, OPEN_FILES):
        world.proxies[0].cut()
        if fault.dice < 0.3:
            world.front.cut()
        await asyncio.sleep(fault.duration_s)
    await world.daemons[0].ready(READY_S)


async def _limit_memory(world: World, fault: Fault) -> None:
    """Let the daemon map no more memory. Libraries in C may abort the process; the run then restarts it, as an init
    system would do."""
    daemon = world.daemons[0]
    ends = len(daemon.ended_by_itself)
    with _limited(daemon.pid, resource.RLIMIT_AS, _mapped_bytes(daemon.pid)):
        await asyncio.sleep(fault.duration_s)
    await daemon.ready(READY_S)
    del daemon.ended_by_itself[ends:]


def _mapped_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


async def _fill_spool_disk(world: World, _fault: Fault) -> None:
    """Archive days while the spool has no space for a single object: none of the days may be dropped."""
    spool = world.daemons[0].folder / "data" / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    world.guard.report("mount", spool)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SPOOL_BYTES}", "nexhb-faults", str(spool)]
    if (await asyncio.to_thread(subprocess.run, mount, check=False, capture_output=True)).returncode:
        raise NotPossible("the spool cannot be mounted")
    try:
        with suppress(OSError):
            (spool / "filler").write_bytes(bytes(1 << 20))
        await archive_days(world, NIGHTLY_RUN_S)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(spool)], check=False, capture_output=True)


SPOOL_FULL = "spool disk full"
KINDS = (
    FaultKind("inodes run out", Lane.PROCESSES, (0.5, 2.5), _fill_inodes, own_cluster=True, small_disk=True),
    FaultKind("log disk full", Lane.PROCESSES, (0.5, 1.5), _fill_log_disk, own_cluster=True),
    FaultKind("open files run out", Lane.PROCESSES, (0.5, 2.5), _limit_open_files),
    FaultKind("memory runs out", Lane.PROCESSES, (0.5, 2.5), _limit_memory),
    FaultKind(SPOOL_FULL, Lane.TABLES, (1.0, 2.0), _fill_spool_disk, own_cluster=True, small_disk=True),
)
