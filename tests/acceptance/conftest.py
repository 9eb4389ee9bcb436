"""Fixtures of the acceptance tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import forks
from tests.support.site import Site, new_site


@pytest.fixture
def site() -> Iterator[Site]:
    """A machine without data; its daemons are forks."""
    with new_site(forks.popen) as site:
        yield site
