"""A transaction whose COMMIT was not answered: what is known of it, and how its outcome is looked up."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable
from nexhb.heartbeat import Heartbeat, Key
from nexhb.ingest.connection import Session
from nexhb.ingest.intake import Verdict
from nexhb.postgres import sql

_Q = sql.queries("writer")
_log = log.get("writer")


class Doubt(NamedTuple):
    """A transaction that may be committed or not, or that may be missing on the synchronous standby."""

    xid: str
    verdicts: tuple[Verdict, ...]  # of all heartbeats of the batch; they are valid if the transaction is committed
    keys: frozenset[Key]  # the keys of its rows
    witness: Heartbeat | None  # one of its rows: it is stored if the transaction is committed
    detail: str


class InDoubt(DatabaseUnavailable):
    sentence = "COMMIT was not answered, or not confirmed by a synchronous standby."

    def __init__(self, doubt: Doubt) -> None:
        self.doubt = doubt
        super().__init__(doubt.detail)


async def resolve(session: Session, doubt: Doubt) -> list[Verdict] | None:
    """Return the verdicts of a transaction whose COMMIT was not answered, or None if it was not committed.

    Raise InDoubt again while the transaction is in progress, or if a synchronous standby does not confirm it.
    """
    outcome = await _outcome(session, doubt)
    metrics.commits_in_doubt.labels(outcome=str(outcome)).inc()
    _log.warning("commit.in_doubt", xid=doubt.xid, outcome=outcome)
    if outcome == "in progress":
        raise InDoubt(doubt)
    if outcome != "committed":
        return None  # aborted or unknown; if committed after all, the rows' key makes a second write harmless
    if not await session.is_confirmed():
        metrics.commits_in_doubt.labels(outcome="unconfirmed").inc()
        raise InDoubt(doubt)
    session.recent.add(doubt.keys)
    return list(doubt.verdicts)


async def _outcome(session: Session, doubt: Doubt) -> str | None:
    """Return the status of the transaction, verified by one of its rows. After a crash, PostgreSQL does not know a
    transaction of which nothing was on disk: its id is then unused, or belongs to another transaction."""
    try:
        outcome: str | None = await session.conn.fetchval(_Q["xact_status"], doubt.xid)
    except asyncpg.InvalidParameterValueError:
        return "forgotten"
    witness = doubt.witness
    if outcome == "committed" and witness is not None:
        key = (witness.device_no, witness.bucket, witness.ts, witness.received_at)
        return outcome if await session.conn.fetchval(_Q["is_stored"], *key) else "forgotten"
    return outcome
