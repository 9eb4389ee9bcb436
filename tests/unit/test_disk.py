from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nexhb import disk
from nexhb.disk import FreeSpace

RESERVE: dict[str, Any] = {"reserve_bytes": 2**28, "reserve_inodes": 10_000}
MANY = 2**40


@pytest.mark.parametrize(
    ("space", "held", "shortage"),
    [
        (FreeSpace(2**28, MANY, MANY), False, ""),
        (FreeSpace(2**28, MANY, MANY), True, "MiB are free"),  # not yet a tenth more than the reserve
        (FreeSpace(2**28 + 2**27, MANY, MANY), True, ""),
        (FreeSpace(2**28 - 1, MANY, MANY), False, "255 MiB are free"),
        (FreeSpace(0, MANY, MANY), False, "MiB are free"),
        (FreeSpace(MANY, 9_999, MANY), False, "9999 inodes are free"),
        (FreeSpace(MANY, 10_000, MANY), False, ""),
        (FreeSpace(MANY, 10_000, MANY), True, "inodes are free"),
        (FreeSpace(MANY, 11_000, MANY), True, ""),
        (FreeSpace(MANY, 0, MANY), False, "0 inodes are free"),
        (FreeSpace(MANY, 0, 0), False, ""),  # btrfs has no fixed number: it creates inodes on demand
        (FreeSpace(MANY, 3_000, 65_536), False, "reserve of 3276"),  # a disk of 1 GB
        (FreeSpace(MANY, 3_300, 65_536), False, ""),
    ],
)
def test_a_disk_is_low_below_its_reserve_of_bytes_or_of_inodes(space: FreeSpace, held: bool, shortage: str) -> None:
    found = space.shortage(**RESERVE, held=held)
    assert (shortage in str(found)) if shortage else found is None


def statvfs(free: int, inodes: int, all_inodes: int) -> os.statvfs_result:
    """The figures of a file system with blocks of 1 byte."""
    return os.statvfs_result((1, 1, free, free, free, all_inodes, inodes, inodes, 0, 255))


def test_the_minimum_of_several_file_systems_counts_and_one_without_a_limit_of_inodes_is_left_out() -> None:
    assert disk.minimum([statvfs(5, 100, 1_000), statvfs(7, 10, 2_000), statvfs(9, 0, 0)]) == FreeSpace(5, 10, 1_000)
    assert disk.minimum([statvfs(9, 0, 0)]) == FreeSpace(9, 0, 0)


def test_the_write_ahead_log_may_be_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pg" / "pg_wal").mkdir(parents=True)
    free = {tmp_path: 100, tmp_path / "pg": 90, tmp_path / "pg" / "pg_wal": 3}

    def fake_statvfs(folder: Path) -> os.statvfs_result:
        if folder not in free:
            raise FileNotFoundError(folder)
        return statvfs(free[folder], 1, 1)

    monkeypatch.setattr(os, "statvfs", fake_statvfs)
    assert disk.free_space(tmp_path).free_bytes == 3
