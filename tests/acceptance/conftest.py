"""What the acceptance tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH: its `nexhb` is a fork of a process that has imported all, which saves a second each time."""
    folder = tmp_path_factory.mktemp("commands")
    with warm.shim(folder / "nexhb", folder / "warm"):
        yield folder
