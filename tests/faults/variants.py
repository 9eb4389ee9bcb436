"""Writers that break the promise, kept so that the machine can be seen to find each: the proof that it can fail.

`python -m tests.faults.variants NAME serve` is `nexhb serve` with one of them in its place. `proofs.py` says which
fault reveals it, and which word of the check it must be caught by.
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

from nexhb import cli, clock, daemon, identity, log, writer
from nexhb.archive import marker, verify
from nexhb.archive.store import Store
from nexhb.daemon import State
from nexhb.db import Connection
from nexhb.devices import Device, DeviceStore
from nexhb.intake import WRITTEN, Intake, Ticket, Verdict
from nexhb.jobs import nightly
from nexhb.jobs.plan import Step
from nexhb.pgerrors import FROM_THE_DATABASE
from nexhb.wire import Heartbeat
from nexhb.writer import Writer, _InDoubt

_OF_THIS_DEVICE = "WHERE d.device_no = f.device_no"
_ONLY_NEWER = "SELECT newer_content("


def _say_written(intake: Intake, tickets: list[Ticket]) -> None:
    intake.settle(tickets, [WRITTEN] * sum(len(ticket.heartbeats) for ticket in tickets))


class AnswersFirst(Writer):
    """Answers before the commit: what then does not come about was promised."""

    async def _write(self, tickets: list[Ticket]) -> None:
        _say_written(self._intake, tickets)
        await super()._write(tickets)


class RetriesBlindly(Writer):
    """Writes once more what may be in already, without asking. The key makes that harmless for the rows; it shows in
    the verdict (a duplicate at its first attempt), and without the key in every row that is there twice."""

    async def _resolve_doubt(self, conn: Connection, doubt: _InDoubt) -> list[Verdict] | None:
        self._doubt = None
        return None


class BelievesTheNumber(Writer):
    """Takes "committed" for its own transaction's, as nexhb did once: a crash gives the number to another."""

    async def _outcome(self, conn: Connection, doubt: _InDoubt) -> str | None:
        doubt.witness = None
        return await super()._outcome(conn, doubt)


class DropsAndAnswers(Writer):
    """A batch that fails is forgotten, and answered as if it were in."""

    async def _patiently(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        try:
            return await self._attempt(heartbeats)
        except Exception:
            return [WRITTEN] * len(heartbeats)


class Forgets(Writer):
    """When the daemon is to stop, answers what it holds, and holds it no more."""

    _all: list[Forgets] = []  # noqa: RUF012 - the one of this process, for `_stopping`
    _stopped = False

    async def run(self) -> None:
        """See Writer."""
        self._all.append(self)
        await super().run()

    def forget(self) -> None:
        """All that is unanswered."""
        self._stopped = True
        _say_written(self._intake, list(self._intake._unanswered))
        if self._conn is not None:
            self._conn.terminate()

    async def _attempt(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        if self._stopped:
            raise NotImplementedError
        return await super()._attempt(heartbeats)


class StumblesInDoubt(Writer):
    """An error of its own where it should ask what became of a COMMIT. The devices come again, and nothing is lost."""

    async def _resolve_doubt(self, conn: Connection, doubt: _InDoubt) -> list[Verdict] | None:
        raise UnboundLocalError


class NeverListensAgain(DeviceStore):
    """Once its connection was lost, it loses each new one: nobody but the log says so."""

    async def run(self) -> None:
        """See DeviceStore."""
        with suppress(*FROM_THE_DATABASE):
            await self._follow()
        while True:
            variant_log.warning("devices.listen_lost", error="the connection before this one was lost")
            await asyncio.sleep(1)


class BelievesAWarning(Writer):
    """Takes a COMMIT that no longer waits for its standby for one that the standby has."""

    def _note_warning(self, _conn: object, message: asyncpg.PostgresLogMessage) -> None:
        """See Writer."""


class KeepsItsMemory(Writer):
    """What it learned on one connection it believes on the next, whichever database that leads to."""

    def _forget(self) -> None:
        return None


class DiesOfACancel(DeviceStore):
    """Takes a statement that somebody cancelled for an error that nobody knows."""

    async def _read_all(self, conn: Connection, why: str) -> None:
        try:
            await super()._read_all(conn, why)
        except asyncpg.QueryCanceledError as error:
            raise NotImplementedError from error


class KeepsTheRevoked(DeviceStore):
    """Hears nothing of what becomes of tokens that it knows."""

    async def run(self) -> None:
        """See DeviceStore."""
        await asyncio.Event().wait()


class TurnsAwayTheNew(KeepsTheRevoked):
    """Nor asks the database for those that it does not know."""

    async def find(self, token_hash: bytes) -> Device | None:
        """See DeviceStore."""
        return self.known(token_hash)


class TrustsItsListener(DeviceStore):
    """Never asks whether it has missed a change, and so does not see that its connection is dead."""

    async def _is_behind(self, conn: Connection) -> bool:
        return False


def _put(kind: type[Writer | DeviceStore]) -> Callable[[], None]:
    def patch() -> None:
        base = Writer if issubclass(kind, Writer) else DeviceStore
        setattr(daemon, base.__name__, kind)  # an import there, and no export

    return patch


def _status_moves_back() -> None:
    """Whatever comes last is the last status, however old."""
    statement = writer._Q["upsert_last_status"]
    assert _ONLY_NEWER in statement
    broken = statement.replace(_ONLY_NEWER, _ONLY_NEWER.replace("SELECT", "SELECT true OR"))
    writer._Q = {**writer._Q, "upsert_last_status": broken}


def _turns_away_the_forgotten() -> None:
    """Takes an older copy for all that there is to know."""
    setattr(identity.Lives, "older", "")  # noqa: B010 - mypy: it is a property there


def _dies_of_its_log() -> None:
    """A line that cannot be written is an error like any other."""
    setup = log.setup

    def patched(level: str = "info", stream: TextIO | None = None) -> None:
        setup(level, stream)
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream or sys.stderr))

    log.setup = patched


def _believes_the_store() -> None:
    """Reads nothing back: what the store calls stored is stored."""

    async def verified(_store: Store, _name: str, _sha256: str, _spool: Path | None = None) -> None:
        return None

    setattr(verify, "verify", verified)  # noqa: B010 - mypy: it is a function there


def _goes_on_without_an_archive() -> None:
    """A day that could not be archived is dropped with the others."""
    archive = nightly.Night._archive

    async def patched(self: nightly.Night, step: Step) -> None:
        try:
            await archive(self, step)
        except Exception:
            await self._conn.execute(f"DROP TABLE {step.target}")

    nightly.Night._archive = patched  # type: ignore[method-assign]


def _keeps_the_first_time() -> None:
    """Asks the database for the time once, and never again."""
    learn = clock.DatabaseClock.learn
    asked: set[clock.DatabaseClock] = set()

    async def once(self: clock.DatabaseClock, conn: Connection) -> None:
        if self not in asked:
            await learn(self, conn)
        asked.add(self)

    setattr(clock.DatabaseClock, "learn", once)  # noqa: B010 - mypy: it is a method there


def _trusts_any_store() -> None:
    """Puts its marker there, and never looks for it: whatever lies at the url is the archive."""

    async def there(_store: Store, _name: str) -> bool:
        return True

    setattr(marker, "_is_there", there)  # noqa: B010 - mypy: it is a function there


def _keeps_the_first_facts() -> None:
    """What a device once said of itself stays, whatever it says later."""
    statement = writer._Q["update_facts"]
    assert _OF_THIS_DEVICE in statement
    broken = statement.replace(_OF_THIS_DEVICE, f"{_OF_THIS_DEVICE} AND d.facts_ts IS NULL")
    writer._Q = {**writer._Q, "update_facts": broken}


def _forgets() -> None:
    stopping = daemon._stopping

    def patched(state: State) -> None:
        stopping(state)
        for one in Forgets._all:
            one.forget()

    daemon._stopping = patched
    _put(Forgets)()


variant_log = log.get("devices")
VARIANTS: dict[str, Callable[[], None]] = {
    "answers-before-commit": _put(AnswersFirst),
    "retries-commit-blindly": _put(RetriesBlindly),
    "believes-the-number": _put(BelievesTheNumber),
    "drops-a-failed-batch": _put(DropsAndAnswers),
    "status-moves-back": _status_moves_back,
    "keeps-the-first-facts": _keeps_the_first_facts,
    "forgets-at-the-stop": _forgets,
    "stumbles-in-doubt": _put(StumblesInDoubt),
    "keeps-the-revoked": _put(KeepsTheRevoked),
    "turns-away-the-new": _put(TurnsAwayTheNew),
    "keeps-its-memory": _put(KeepsItsMemory),
    "turns-away-the-forgotten": _turns_away_the_forgotten,
    "believes-a-warning": _put(BelievesAWarning),
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
