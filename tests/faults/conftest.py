"""Fixtures of the fault tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import stopped
from tests.faults.guard import guarding


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """Yield the folder of a stopped cluster, of which each test uses a copy."""
    with asyncio.Runner() as runner, guarding() as guard:
        context = stopped(guard)
        yield runner.run(context.__aenter__())
