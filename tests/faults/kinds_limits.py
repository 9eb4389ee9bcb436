"""What runs out: inodes, open files, memory, the disk below a log and below the spool."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.kinds_processes import READY_S, hit, own_cluster
from tests.faults.kinds_tables import SENDING_S, send_days_away
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

SPOOL_BYTES = "64k"
FILES = 8  # fewer than are open whatever happens
SEGMENTS = 12  # of the WAL: more than PostgreSQL keeps for later use


async def _fill_inodes(world: World, fault: Fault) -> None:
    """With the next segment of the WAL due, PostgreSQL cannot go on; nor can a day, or a sort's file, be made."""
    cluster = own_cluster(world)
    try:
        await asyncio.to_thread(cluster.fill_inodes)
        with suppress(*UNREACHABLE, TimeoutError):
            async with world.connection() as conn:
                for _ in range(SEGMENTS):
                    await conn.execute("SELECT pg_logical_emit_message(true, 'faults', ''), pg_switch_wal()")
        await asyncio.sleep(fault.lasts_s)
    finally:
        await asyncio.to_thread(cluster.free_inodes)
    await world.daemons[0].ready(READY_S)


async def _full_log(world: World, fault: Fault) -> None:
    """Not a line can be logged, from the daemon's start on: it serves nevertheless."""
    daemon = world.daemons[0]
    daemon.logs_to = Path("/dev/full")
    ends = len(daemon.ended_by_itself)
    try:
        if not daemon.send_signal(signal.SIGTERM):
            raise Unable("the daemon does not run")
        until = time.monotonic() + READY_S
        while await daemon.ready(1.0) is None and time.monotonic() < until:
            if len(daemon.ended_by_itself) > ends + 1:
                world.blame("stuck", "with a full disk below its log the daemon ends again and again")
                break
        await asyncio.sleep(fault.lasts_s)
    finally:
        daemon.logs_to = daemon.log_path
        await hit(daemon, signal.SIGTERM)
        del daemon.ended_by_itself[ends:]  # a start without a database could not say why it ended


@contextmanager
def _limited(pid: int, what: int, soft: int) -> Iterator[None]:
    """That process has no more of it for the block."""
    if not pid:
        raise Unable("the daemon does not run")
    try:
        before = resource.prlimit(pid, what)
        resource.prlimit(pid, what, (soft, before[1]))
    except (ProcessLookupError, PermissionError) as error:
        raise Unable(f"{error}") from error
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


async def _few_files(world: World, fault: Fault) -> None:
    """Those who are connected go on; the database's sessions, and sometimes devices, come again in vain."""
    with _limited(world.daemons[0].pid, resource.RLIMIT_NOFILE, FILES):
        world.proxies[0].cut()
        if fault.dice < 0.3:
            world.front.cut()
        await asyncio.sleep(fault.lasts_s)
    await world.daemons[0].ready(READY_S)


async def _little_memory(world: World, fault: Fault) -> None:
    """Libraries in C may end the process: it is started again, as an init system would."""
    daemon = world.daemons[0]
    ends = len(daemon.ended_by_itself)
    with _limited(daemon.pid, resource.RLIMIT_AS, _mapped(daemon.pid)):  # not a page more
        await asyncio.sleep(fault.lasts_s)
    await daemon.ready(READY_S)
    del daemon.ended_by_itself[ends:]


def _mapped(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


async def _full_spool(world: World, _fault: Fault) -> None:
    """Days are to be archived, and there is no room for a single object: none of them may go."""
    spool = world.daemons[0].folder / "data" / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    world.guard.tell("mount", spool)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SPOOL_BYTES}", "nexhb-faults", str(spool)]
    if (await asyncio.to_thread(subprocess.run, mount, check=False, capture_output=True)).returncode:
        raise Unable("the spool cannot be mounted")
    try:
        with suppress(OSError):
            (spool / "ballast").write_bytes(bytes(1 << 20))
        await send_days_away(world, SENDING_S)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(spool)], check=False, capture_output=True)


FULL_SPOOL = "spool full"
KINDS = (
    Kind("inodes run out", "processes", (0.5, 2.5), _fill_inodes, own_cluster=True, small_disk=True),
    Kind("log full", "processes", (0.5, 1.5), _full_log, own_cluster=True),
    Kind("open files run out", "processes", (0.5, 2.5), _few_files),
    Kind("memory runs out", "processes", (0.5, 2.5), _little_memory),
    Kind(FULL_SPOOL, "tables", (1.0, 2.0), _full_spool, own_cluster=True, small_disk=True),
)
