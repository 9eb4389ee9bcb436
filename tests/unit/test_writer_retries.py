"""The writer's retry loop, with attempts that fail as the test says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from unittest.mock import Mock

import asyncpg
import pytest

from nexhb.errors import DayMissing
from nexhb.heartbeat import Heartbeat
from nexhb.ingest import commit, in_doubt, writer
from nexhb.ingest.connection import Session, WriterConnection
from nexhb.ingest.in_doubt import Doubt, InDoubt
from nexhb.ingest.intake import WRITTEN, Intake, Outcome, Verdict
from nexhb.ingest.writer import Writer
from nexhb.postgres.connections import Database
from nexhb.postgres.identity import DatabaseTracker
from nexhb.readiness import Readiness
from tests.support.heartbeats import beat

LOST = asyncpg.ConnectionDoesNotExistError
DOUBT = Doubt("7", (WRITTEN,), frozenset(), None, "the connection is gone")


class Attempts:
    """The attempts of a writer to commit: each raises the next error of `errors`; once no error is left, an attempt
    succeeds."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.writes = 0
        self.longest_waits_s: list[float] = []
        self.doubts: list[Doubt] = []
        self.outcomes: list[list[Verdict] | Exception | None] = []  # results of the look-ups of a transaction in doubt
        self.tracker = DatabaseTracker()
        intake = Intake(Readiness(), max_items=1, max_bytes=1)
        self._writer = Writer(
            Database("postgresql://nobody@127.0.0.1:1/none"), intake, Readiness(), batch_max=1, tracker=self.tracker
        )

    async def write(self, _session: Session, heartbeats: Sequence[Heartbeat], _intake: Intake) -> list[Verdict]:
        """Take the place of commit.write."""
        self.writes += 1
        if self.errors:
            raise self.errors.pop(0)
        return [WRITTEN] * len(heartbeats)

    async def resolve(self, _session: Session, doubt: Doubt) -> list[Verdict] | None:
        """Take the place of in_doubt.resolve."""
        self.doubts.append(doubt)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def uniform(self, _low: float, high: float) -> float:
        """Take the place of random.uniform; return 0, so that no test waits."""
        self.longest_waits_s.append(high)
        return 0.0

    async def run(self, *errors: Exception) -> list[Verdict]:
        """Commit one heartbeat with attempts that raise these errors."""
        self.errors += errors
        return await self._writer._commit_or_split([beat()])


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Return the attempts of a writer, without a database."""

    async def session(_self: WriterConnection) -> Session:
        return Session(Mock())

    attempts = Attempts()
    monkeypatch.setattr(WriterConnection, "session", session)
    monkeypatch.setattr(commit, "write", attempts.write)
    monkeypatch.setattr(in_doubt, "resolve", attempts.resolve)
    monkeypatch.setattr(random, "uniform", attempts.uniform)
    return attempts


@pytest.mark.parametrize("error", [LOST, asyncpg.DeadlockDetectedError, DayMissing, MemoryError])
async def test_an_error_that_may_pass_is_retried(attempts: Attempts, error: type[Exception]) -> None:
    assert await attempts.run(error("odd"), error("odd")) == [WRITTEN]
    assert attempts.writes == 3


async def test_the_longest_wait_doubles_from_20_ms_to_1_s(attempts: Attempts) -> None:
    await attempts.run(*[LOST("gone") for _ in range(8)])
    assert attempts.longest_waits_s == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1])


async def test_an_unknown_error_is_not_retried(attempts: Attempts) -> None:
    with pytest.raises(KeyError):
        await attempts.run(KeyError("odd"))
    assert (attempts.writes, attempts.longest_waits_s) == (1, [])


async def test_there_is_no_retry_once_the_time_is_over(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_FOR_S", 0.0)
    [verdict] = await attempts.run(LOST("gone"))
    assert (verdict.outcome, attempts.writes) == (Outcome.FAILED, 1)


async def test_a_database_that_was_replaced_is_not_retried(attempts: Attempts) -> None:
    attempts.tracker.epoch += 1  # the device numbers of the heartbeat belong to the previous database
    [verdict] = await attempts.run()
    assert (verdict.outcome, attempts.writes, attempts.longest_waits_s) == (Outcome.FAILED, 0, [])


async def test_a_committed_doubt_is_the_result(attempts: Attempts) -> None:
    attempts.outcomes = [[WRITTEN]]
    assert await attempts.run(InDoubt(DOUBT)) == [WRITTEN]
    assert (attempts.writes, attempts.doubts) == (1, [DOUBT])


async def test_a_doubt_is_looked_up_until_there_is_an_outcome_and_then_no_more(attempts: Attempts) -> None:
    """The look-up itself may fail and is repeated. Once the transaction is known as not committed, a later error does
    not cause another look-up."""
    attempts.outcomes = [LOST("gone"), InDoubt(DOUBT), None]
    assert await attempts.run(InDoubt(DOUBT), LOST("gone")) == [WRITTEN]
    assert attempts.doubts == [DOUBT] * 3
    assert attempts.writes == 3


async def test_a_doubt_ends_with_its_batch(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "RETRY_FOR_S", 0.0)
        [verdict] = await attempts.run(InDoubt(DOUBT))
    assert verdict.outcome is Outcome.FAILED
    assert await attempts.run() == [WRITTEN]
    assert attempts.doubts == []
