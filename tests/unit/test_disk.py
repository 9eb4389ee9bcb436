from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nexhb import disk
from nexhb.disk import Room

RESERVE: dict[str, Any] = {"reserve_bytes": 2**28, "reserve_inodes": 10_000}
MANY = 2**40


@pytest.mark.parametrize(
    ("room", "held", "low"),
    [
        (Room(2**28, MANY, MANY), False, ""),
        (Room(2**28, MANY, MANY), True, "MiB are free"),  # not yet a tenth more
        (Room(2**28 + 2**27, MANY, MANY), True, ""),
        (Room(2**28 - 1, MANY, MANY), False, "255 MiB are free"),
        (Room(0, MANY, MANY), False, "MiB are free"),
        (Room(MANY, 9_999, MANY), False, "9999 inodes are free"),
        (Room(MANY, 10_000, MANY), False, ""),
        (Room(MANY, 10_000, MANY), True, "inodes are free"),
        (Room(MANY, 11_000, MANY), True, ""),
        (Room(MANY, 0, MANY), False, "0 inodes are free"),
        (Room(MANY, 0, 0), False, ""),  # btrfs: it has none in all, and makes them as it needs them
        (Room(MANY, 3_000, 65_536), False, "of 3276 kept"),  # a disk of 1 GB
        (Room(MANY, 3_300, 65_536), False, ""),
    ],
)
def test_a_disk_is_low_below_its_reserve_of_bytes_or_of_inodes(room: Room, held: bool, low: str) -> None:
    found = room.low(**RESERVE, held=held)
    assert (low in str(found)) if low else found is None


def statvfs(free: int, inodes: int, all_inodes: int) -> os.statvfs_result:
    """Of a file system with blocks of 1 byte."""
    return os.statvfs_result((1, 1, free, free, free, all_inodes, inodes, inodes, 0, 255))


def test_of_several_file_systems_the_least_counts_and_one_without_inodes_of_its_own_does_not() -> None:
    found = disk.least([statvfs(5, 100, 1_000), statvfs(7, 10, 2_000), statvfs(9, 0, 0)])
    assert found == Room(5, 10, 1_000)
    assert disk.least([statvfs(9, 0, 0)]) == Room(9, 0, 0)


def test_the_write_ahead_log_may_lie_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pg" / "pg_wal").mkdir(parents=True)
    free = {tmp_path: 100, tmp_path / "pg": 90, tmp_path / "pg" / "pg_wal": 3}

    def looked_at(folder: Path) -> os.statvfs_result:
        if folder not in free:
            raise FileNotFoundError(folder)
        return statvfs(free[folder], 1, 1)

    monkeypatch.setattr(os, "statvfs", looked_at)
    assert disk.room_at(tmp_path).free_bytes == 3
