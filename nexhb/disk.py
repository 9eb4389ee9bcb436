"""Free bytes and inodes of the file systems that hold the embedded PostgreSQL and the daemon's files, and
a watch that holds the intake before either runs out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path

from nexhb import log, metrics
from nexhb.config import Settings
from nexhb.errors import described
from nexhb.postgres.connections import Hazard
from nexhb.readiness import Readiness, Source

_log = log.get("daemon")

WATCH_S = 2.0  # how often to check; at 100 MB/s, a reserve of 256 MiB lasts longer than this


@dataclass(frozen=True)
class FreeSpace:
    """The free space of one file system, or the minimum over several."""

    free_bytes: int
    free_inodes: int
    inodes: int  # all inodes, free and used; 0 if the file system creates them on demand (btrfs)

    def shortage(self, *, reserve_bytes: int, reserve_inodes: int, held: bool) -> Hazard | None:
        """Return what runs out, or None. Without space for its WAL or an inode for its next file, PostgreSQL would stop
        in mid-operation. Once the intake is `held`, a tenth more must be free before this returns None, or else the
        intake would open and close with every file. On a small file system, a twentieth of the inodes is a sufficient
        reserve."""
        factor = 1.1 if held else 1.0
        if self.free_bytes < reserve_bytes * factor:
            return Hazard(
                f"{self.free_bytes >> 20} MiB are free on the disk of the database, below the reserve of "
                f"{reserve_bytes >> 20} MiB",
                "free space, or shorten partitions.retention_days and run the nightly job",
            )
        reserve = min(reserve_inodes, self.inodes // 20)
        if self.inodes and self.free_inodes < reserve * factor:
            return Hazard(
                f"{self.free_inodes} inodes are free on the disk of the database, below the reserve of {reserve}",
                "delete files that are not PostgreSQL's: df -i shows the disk, du --inodes -xd1 the largest folder",
            )
        return None


def free_space(data_dir: Path) -> FreeSpace:
    """Return the minimum over the file systems that hold the data. Raises OSError if data_dir is not accessible."""
    folders = (data_dir / "pg", data_dir / "pg" / "pg_wal", data_dir / "spool")
    return minimum([os.statvfs(data_dir), *_existing(*folders)])


def minimum(file_systems: list[os.statvfs_result]) -> FreeSpace:
    """Return the minimum of each figure."""
    with_inode_limit = [fs for fs in file_systems if fs.f_files]
    return FreeSpace(
        min(fs.f_bavail * fs.f_frsize for fs in file_systems),
        min((fs.f_favail for fs in with_inode_limit), default=0),
        min((fs.f_files for fs in with_inode_limit), default=0),
    )


def _existing(*folders: Path) -> Iterable[os.statvfs_result]:
    for folder in folders:
        with suppress(OSError):  # the folder does not exist yet, or this user cannot enter it
            yield os.statvfs(folder)


async def watch(settings: Settings, readiness: Readiness) -> None:
    """Hold the intake while the embedded PostgreSQL's disk runs out of bytes or inodes: 503 is better than a PostgreSQL
    that panics. Never returns."""
    database = settings.database
    while database.url is None:
        try:
            space = await asyncio.to_thread(free_space, settings.data_dir)
        except (OSError, RuntimeError, MemoryError) as error:  # a thread may fail to start, too
            _log.error("disk.not_seen", error=described(error))
            await asyncio.sleep(WATCH_S)
            continue
        metrics.disk_free.set(space.free_bytes)
        metrics.disk_free_inodes.set(space.free_inodes if space.inodes else nan)
        before = readiness.reason(Source.DISK)
        shortage = space.shortage(
            reserve_bytes=database.disk_reserve_bytes, reserve_inodes=database.disk_reserve_inodes, held=bool(before)
        )
        if bool(shortage) != bool(before):
            event = "disk.low" if shortage else "disk.enough_again"
            _log.error(
                event,
                free_bytes=space.free_bytes,
                reserve_bytes=database.disk_reserve_bytes,
                free_inodes=space.free_inodes,
            )
        readiness.set(Source.DISK, str(shortage) if shortage else "")
        await asyncio.sleep(WATCH_S)
    metrics.disk_free.set(nan)  # the database's disk is not visible here; a 0 would fire an alert
    metrics.disk_free_inodes.set(nan)
    await asyncio.Event().wait()
