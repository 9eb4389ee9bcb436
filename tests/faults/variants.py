"""Writers that break the promise. The fault machine must catch each, which proves that its check can fail.

`python -m tests.faults.variants NAME serve` runs `nexhb serve` with such a variant in place of the real code.
`proofs.py` names the faults that reveal each variant, and the violation that the check must report.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import asyncpg
import structlog

from nexhb import cli, clock, daemon, log
from nexhb.archive import marker, verify
from nexhb.archive.store import Store
from nexhb.devices.store import Device, DeviceStore
from nexhb.heartbeat import Heartbeat
from nexhb.ingest import commit, in_doubt
from nexhb.ingest.connection import Session, WriterConnection
from nexhb.ingest.in_doubt import Doubt
from nexhb.ingest.intake import WRITTEN, Intake, Ticket, Verdict
from nexhb.ingest.writer import Writer
from nexhb.jobs import nightly
from nexhb.jobs.plan import Step
from nexhb.postgres import identity
from nexhb.postgres.connections import Connection
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.readiness import Readiness, Source

_OF_THIS_DEVICE = "WHERE d.device_no = f.device_no"
_ONLY_NEWER = "SELECT newer_content("


def _say_written(intake: Intake, tickets: list[Ticket]) -> None:
    intake.settle(tickets, [WRITTEN] * sum(len(ticket.heartbeats) for ticket in tickets))


class AnswersFirst(Writer):
    """Acknowledges heartbeats before the commit, which may then fail."""

    async def _settle(self, tickets: list[Ticket]) -> None:
        _say_written(self._intake, tickets)
        await super()._settle(tickets)


class DropsAndAnswers(Writer):
    """Drops a batch that fails, and acknowledges it as if it were committed."""

    async def _retry(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        try:
            return await self._attempt(heartbeats)
        except Exception:
            return [WRITTEN] * len(heartbeats)


class Forgets(Writer):
    """When the daemon is to stop, acknowledges the heartbeats that it holds, and drops them."""

    _all: list[Forgets] = []  # noqa: RUF012 - the writer of this process, for `_forgets`
    _stopped = False

    async def run(self) -> None:
        """See Writer."""
        self._all.append(self)
        await super().run()

    def forget(self) -> None:
        """Acknowledge every unanswered heartbeat, and write no more."""
        self._stopped = True
        _say_written(self._intake, list(self._intake._unanswered))
        self._connection.close()

    async def _attempt(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        if self._stopped:
            raise NotImplementedError
        return await super()._attempt(heartbeats)


class NeverListensAgain(DeviceStore):
    """Once the listener's first connection is lost, loses each new connection; only the log shows that."""

    async def run(self) -> None:
        """See DeviceStore."""
        with suppress(*FROM_THE_DATABASE):
            await self._follow()
        while True:
            variant_log.warning("devices.listen_lost", error="the connection before this one was lost")
            await asyncio.sleep(1)


class DiesOfACancel(DeviceStore):
    """Treats a cancelled statement as an unknown error."""

    async def _read_all(self, conn: Connection, why: str) -> None:
        try:
            await super()._read_all(conn, why)
        except asyncpg.QueryCanceledError as error:
            raise NotImplementedError from error


class KeepsTheRevoked(DeviceStore):
    """Receives no changes of the tokens that it knows."""

    async def run(self) -> None:
        """See DeviceStore."""
        await asyncio.Event().wait()


class TurnsAwayTheNew(KeepsTheRevoked):
    """As KeepsTheRevoked, and does not look up unknown tokens in the database."""

    async def look_up(self, token_hash: bytes) -> Device | None:
        """See DeviceStore."""
        return self.cached(token_hash)


class TrustsItsListener(DeviceStore):
    """Never checks whether it has missed a change, and so does not detect that its connection is dead."""

    async def _is_behind(self, conn: Connection) -> bool:
        return False


def _put(kind: type[Writer | DeviceStore]) -> Callable[[], None]:
    def patch() -> None:
        base = Writer if issubclass(kind, Writer) else DeviceStore
        setattr(daemon, base.__name__, kind)  # set by name: `daemon` imports the class, but does not export it

    return patch


def _status_moves_back() -> None:
    """Store the heartbeat that arrives last as the last status, however old it is."""
    statement = commit._Q["upsert_last_status"]
    assert _ONLY_NEWER in statement
    broken = statement.replace(_ONLY_NEWER, _ONLY_NEWER.replace("SELECT", "SELECT true OR"))
    commit._Q = {**commit._Q, "upsert_last_status": broken}


def _retries_blindly() -> None:
    """Write again what may be committed already, without asking the database. The history's unique index prevents
    second rows, but the verdict is wrong (a duplicate at its first attempt). Without the index, rows are stored
    twice."""

    async def unasked(_session: Session, _doubt: Doubt) -> list[Verdict] | None:
        return None

    setattr(in_doubt, "resolve", unasked)  # noqa: B010 - mypy: it is a function there


def _believes_the_number() -> None:
    """Conclude from the status "committed" of a transaction ID that this transaction is committed. Formerly, nexhb did
    so; but after a crash, another transaction can have that ID."""
    outcome = in_doubt._outcome

    async def without_witness(session: Session, doubt: Doubt) -> str | None:
        return await outcome(session, doubt._replace(witness=None))

    setattr(in_doubt, "_outcome", without_witness)  # noqa: B010 - mypy: it is a function there


def _stumbles_in_doubt() -> None:
    """Raise an error instead of looking up the outcome of a COMMIT. The devices send again, and nothing is lost."""

    async def stumbling(_session: Session, _doubt: Doubt) -> list[Verdict] | None:
        raise UnboundLocalError

    setattr(in_doubt, "resolve", stumbling)  # noqa: B010 - mypy: it is a function there


def _believes_a_warning() -> None:
    """Treat a COMMIT that no longer waits for its standby as received by the standby."""

    def unnoted(_session: Session, _conn: object, _message: asyncpg.PostgresLogMessage) -> None:
        return None

    setattr(Session, "_note_warning", unnoted)  # noqa: B010 - mypy: it is a method there


def _keeps_its_memory() -> None:
    """Keep the caches of a connection for the next connection, even if the next one leads to another database."""
    open_session = WriterConnection._open
    sessions: list[Session] = []

    async def patched(self: WriterConnection) -> Session:
        session = await open_session(self)
        for last in sessions[-1:]:
            session.recent, session.labels, session.tables = last.recent, last.labels, last.tables
        sessions[:] = [session]
        return session

    setattr(WriterConnection, "_open", patched)  # noqa: B010 - mypy: it is a method there


def _turns_away_the_forgotten() -> None:
    """Treat an older copy of the database as complete."""
    setattr(identity.DatabaseTracker, "older_copy", "")  # noqa: B010 - mypy: it is a property there


def _dies_of_its_log() -> None:
    """Raise an error if a log line cannot be written."""
    setup = log.setup

    def patched(level: str = "info", stream: TextIO | None = None) -> None:
        setup(level, stream)
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream or sys.stderr))

    log.setup = patched


def _believes_the_store() -> None:
    """Trust the store: do not read back what it reports as stored."""

    async def verified(_store: Store, _name: str, _sha256: str, _spool: Path | None = None) -> None:
        return None

    setattr(verify, "verify", verified)  # noqa: B010 - mypy: it is a function there


def _goes_on_without_an_archive() -> None:
    """Drop a day even if it could not be archived."""
    archive = nightly.NightlyRun._archive

    async def patched(self: nightly.NightlyRun, step: Step) -> None:
        try:
            await archive(self, step)
        except Exception:
            await self._conn.execute(f"DROP TABLE {step.target}")

    nightly.NightlyRun._archive = patched  # type: ignore[method-assign]


def _keeps_the_first_time() -> None:
    """Ask the database for the time once, and never again."""
    learn = clock.DatabaseClock.learn
    asked: set[clock.DatabaseClock] = set()

    async def once(self: clock.DatabaseClock, conn: Connection) -> None:
        if self not in asked:
            await learn(self, conn)
        asked.add(self)

    setattr(clock.DatabaseClock, "learn", once)  # noqa: B010 - mypy: it is a method there


def _trusts_any_store() -> None:
    """Write the marker, but never look for it: treat whatever is at the URL as the archive."""

    async def there(_store: Store, _name: str) -> bool:
        return True

    setattr(marker, "_is_there", there)  # noqa: B010 - mypy: it is a function there


def _keeps_the_first_facts() -> None:
    """Keep what a device first reported about itself, whatever it reports later."""
    statement = commit._Q["update_facts"]
    assert _OF_THIS_DEVICE in statement
    broken = statement.replace(_OF_THIS_DEVICE, f"{_OF_THIS_DEVICE} AND d.facts_ts IS NULL")
    commit._Q = {**commit._Q, "update_facts": broken}


def _forgets() -> None:
    block = Readiness.block

    def patched(readiness: Readiness, source: Source, reason: str) -> None:
        block(readiness, source, reason)
        if "stopping" in reason:
            for one in Forgets._all:
                one.forget()

    setattr(Readiness, "block", patched)  # noqa: B010 - mypy: it is a method there
    _put(Forgets)()


variant_log = log.get("devices")
VARIANTS: dict[str, Callable[[], None]] = {
    "answers-before-commit": _put(AnswersFirst),
    "retries-commit-blindly": _retries_blindly,
    "believes-the-number": _believes_the_number,
    "drops-a-failed-batch": _put(DropsAndAnswers),
    "status-moves-back": _status_moves_back,
    "keeps-the-first-facts": _keeps_the_first_facts,
    "forgets-at-the-stop": _forgets,
    "stumbles-in-doubt": _stumbles_in_doubt,
    "keeps-the-revoked": _put(KeepsTheRevoked),
    "turns-away-the-new": _put(TurnsAwayTheNew),
    "keeps-its-memory": _keeps_its_memory,
    "turns-away-the-forgotten": _turns_away_the_forgotten,
    "believes-a-warning": _believes_a_warning,
    "dies-of-its-log": _dies_of_its_log,
    "believes-the-store": _believes_the_store,
    "goes-on-without-an-archive": _goes_on_without_an_archive,
    "dies-of-a-cancel": _put(DiesOfACancel),
    "trusts-its-listener": _put(TrustsItsListener),
    "trusts-any-store": _trusts_any_store,
    "keeps-the-first-time": _keeps_the_first_time,
    "never-listens-again": _put(NeverListensAgain),
}


def main() -> None:
    """Run nexhb with the variant that the first argument names."""
    VARIANTS[sys.argv.pop(1)]()
    cli.main()


if __name__ == "__main__":
    main()
