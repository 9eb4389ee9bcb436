"""The database's time is taken where its answer says something, and stays where it only confirms what is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from nexhb.clock import TRUE_TO_S, DatabaseClock
from nexhb.db import Connection

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


class Server:
    """A database whose clock is `ahead` of the host's, and whose answers take `takes_s` there and as much back."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        self.ahead = timedelta(0)
        self.takes_s = 0.0

    def monotonic(self) -> float:
        """The host's monotonic clock."""
        return self.passed_s

    def host(self) -> datetime:
        """The host's clock."""
        return NOON + timedelta(seconds=self.passed_s)

    async def fetchval(self, _query: str) -> datetime:
        """The time at the server, in the middle of the way there and back."""
        self.passed_s += self.takes_s
        answer = self.host() + self.ahead
        self.passed_s += self.takes_s
        return answer


async def error_s(server: Server, clock: DatabaseClock) -> float:
    """By how much the clock is ahead of the database's after another look."""
    await clock.learn(cast(Connection, cast(Any, server)))
    return (clock() - server.host() - server.ahead).total_seconds()


async def test_the_time_of_an_answer_is_the_middle_of_its_way() -> None:
    server = Server()
    server.ahead, server.takes_s = timedelta(hours=1), 0.25
    assert await error_s(server, DatabaseClock(server.host, server.monotonic)) == pytest.approx(0, abs=1e-4)


async def test_an_answer_that_took_too_long_says_nothing() -> None:
    """A database that was frozen for minutes would have turned the daemon's clock by as much."""
    server = Server()
    clock = DatabaseClock(server.host, server.monotonic)
    server.ahead, server.takes_s = timedelta(seconds=90), TRUE_TO_S + 0.01
    assert await error_s(server, clock) == pytest.approx(-90, abs=1e-4)
    assert clock.apart == timedelta(0)
    server.takes_s = TRUE_TO_S - 0.01
    assert await error_s(server, clock) == pytest.approx(0, abs=1e-4)


async def test_an_answer_that_only_confirms_what_is_known_moves_nothing() -> None:
    """Time would go back and forth by a network's jitter, and heartbeats with it."""
    server = Server()
    server.takes_s = 0.1
    clock = DatabaseClock(server.host, server.monotonic)
    await error_s(server, clock)
    before = clock._base
    for jitter_s in (0.09, -0.09, 0.05):
        server.ahead = timedelta(seconds=jitter_s)
        assert await error_s(server, clock) == pytest.approx(-jitter_s, abs=1e-4)
        assert clock._base == before
    server.ahead = timedelta(seconds=0.11)
    assert await error_s(server, clock) == pytest.approx(0, abs=1e-4)
