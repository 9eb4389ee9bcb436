"""How much room there is where the embedded PostgreSQL and the daemon keep their files: bytes, and inodes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nexhb.db import Finding


@dataclass(frozen=True)
class Room:
    """Of one file system, or the least of several."""

    free_bytes: int
    free_inodes: int
    inodes: int  # in all; 0 where the file system makes them as it needs them (btrfs)

    def low(self, *, reserve_bytes: int, reserve_inodes: int, held: bool) -> Finding | None:
        """What runs out: without room for its WAL, or without an inode for its next file, PostgreSQL would stop in the
        middle of everything. Once `held`, until a tenth more is free: else the intake opens and closes with every
        file. Of a small file system a twentieth of the inodes is enough of a reserve."""
        extra = 1.1 if held else 1.0
        if self.free_bytes < reserve_bytes * extra:
            return Finding(
                f"{self.free_bytes >> 20} MiB are free on the disk of the database, of {reserve_bytes >> 20} kept in "
                "reserve",
                "make room, or shorten partitions.retention_days and run the nightly job",
            )
        reserve = min(reserve_inodes, self.inodes // 20)
        if self.inodes and self.free_inodes < reserve * extra:
            return Finding(
                f"{self.free_inodes} inodes are free on the disk of the database, of {reserve} kept in reserve",
                "delete files that are not PostgreSQL's: df -i shows the disk, du --inodes -xd1 the folder with most",
            )
        return None


def room_at(data_dir: Path) -> Room:
    """The least of the file systems on which the data lies; raises OSError where data_dir cannot be looked at."""
    return least([os.statvfs(data_dir), *_there(data_dir / "pg", data_dir / "pg" / "pg_wal", data_dir / "spool")])


def least(found: list[os.statvfs_result]) -> Room:
    """The least of each."""
    limited = [one for one in found if one.f_files]
    return Room(
        min(one.f_bavail * one.f_frsize for one in found),
        min((one.f_favail for one in limited), default=0),
        min((one.f_files for one in limited), default=0),
    )


def _there(*folders: Path) -> Iterable[os.statvfs_result]:
    for folder in folders:
        with suppress(OSError):  # not made yet, or closed to this user
            yield os.statvfs(folder)
