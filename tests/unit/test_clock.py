"""The daemon's clock follows the database's: imprecise readings are ignored, and a reading that confirms the clock
changes nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from nexhb.clock import MAX_ERROR_S, DatabaseClock
from nexhb.postgres.connections import Connection

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


class Server:
    """A database whose clock is `ahead` of the host's; a message takes `takes_s` each way."""

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
        """Return the server's time, in the middle of the round trip."""
        self.passed_s += self.takes_s
        answer = self.host() + self.ahead
        self.passed_s += self.takes_s
        return answer


async def error_s(server: Server, clock: DatabaseClock) -> float:
    """Read the database's clock once more; return by how much the daemon's clock is then ahead of the database's."""
    await clock.learn(cast(Connection, cast(Any, server)))
    return (clock() - server.host() - server.ahead).total_seconds()


async def test_a_reading_of_the_database_clock_is_dated_to_the_middle_of_its_round_trip() -> None:
    server = Server()
    server.ahead, server.takes_s = timedelta(hours=1), 0.25
    assert await error_s(server, DatabaseClock(server.host, server.monotonic)) == pytest.approx(0, abs=1e-4)


async def test_a_reading_that_took_too_long_is_ignored() -> None:
    """Otherwise a database that does not respond for minutes would move the daemon's clock by minutes."""
    server = Server()
    clock = DatabaseClock(server.host, server.monotonic)
    server.ahead, server.takes_s = timedelta(seconds=90), MAX_ERROR_S + 0.01
    assert await error_s(server, clock) == pytest.approx(-90, abs=1e-4)
    assert clock.apart == timedelta(0)
    server.takes_s = MAX_ERROR_S - 0.01
    assert await error_s(server, clock) == pytest.approx(0, abs=1e-4)


async def test_a_reading_that_confirms_the_time_changes_nothing() -> None:
    """Otherwise the daemon's time, and the times of heartbeats, would jump back and forth with the network's jitter."""
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
