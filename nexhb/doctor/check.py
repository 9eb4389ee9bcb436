"""What every check of `nexhb doctor` receives and returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from nexhb.config import Settings
from nexhb.postgres.connections import Connection


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""  # a command to run, or a page to read


@dataclass(frozen=True)
class CheckContext:
    """What every check receives."""

    conn: Connection
    settings: Settings
    now: datetime


Check = Callable[[CheckContext], Awaitable[CheckResult]]


def shown_time(moment: datetime | None) -> str:
    """Return a time for a message."""
    return f"{moment:%Y-%m-%d %H:%MZ}" if moment else "never"
