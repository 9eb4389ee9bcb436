"""The writer's connection to PostgreSQL: opened when it is needed, checked, and restored after a failure. Whatever the
writer learns of the database belongs to one session and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date

import asyncpg

from nexhb import log
from nexhb.errors import DatabaseUnavailable, described
from nexhb.ingest.batch import Noteworthy, RecentKeys
from nexhb.ingest.labels import Labels
from nexhb.postgres import connections, sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import Kind, classify, reason
from nexhb.postgres.identity import DatabaseTracker
from nexhb.readiness import Readiness, Source

_C = sql.queries("connections")
_Q = sql.queries("writer")
_log = log.get("writer")

STATEMENT_TIMEOUT_S = 5.0
RECENT_KEYS = 50_000  # keys per generation: 25 minutes of 2,000 devices, 4 MB
DEFAULT = Noteworthy()
RECOVER_WAIT_S = 2.0  # longest wait between two connection attempts while the database is away


class Session:
    """One connection, the state of its transaction, and what was learned on it. All of that ends with the connection,
    because the next connection may lead to another database, or to an earlier state of the same database."""

    def __init__(self, conn: Connection, noteworthy: Noteworthy = DEFAULT) -> None:
        self.conn = conn
        self.noteworthy = noteworthy
        self.recent = RecentKeys(RECENT_KEYS)  # the keys of committed rows only
        self.labels = Labels()
        self.tables: dict[date, str] = {}  # the table of each day that is known to have a partition
        self._begun = False  # an empty transaction is open already
        self._warning = ""  # the last warning of PostgreSQL
        conn.add_log_listener(self._note_warning)

    # ---- transactions -----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Begin a transaction, unless the last COMMIT has begun it."""
        if not self._begun:
            await self.conn.execute("BEGIN")
        self._begun = False

    async def commit(self, *, chain: bool) -> None:
        """Commit. With `chain`, the same message begins the next transaction: during a separate BEGIN PostgreSQL would
        be idle while the daemon reads the requests that have arrived.

        Raise DatabaseUnavailable if COMMIT succeeded with a warning: PostgreSQL stopped waiting for a synchronous
        standby, because of a timeout or a pg_cancel_backend, and only the primary has the transaction."""
        self._warning = ""
        await self.conn.execute("COMMIT AND CHAIN" if chain else "COMMIT")
        self._begun = chain
        if self._warning:
            raise DatabaseUnavailable(f"COMMIT succeeded with a warning: {self._warning}.")

    async def roll_back(self) -> None:
        """Roll back. If that fails, end the connection: the next batch must not start within this transaction."""
        try:
            await self.conn.execute("ROLLBACK")
        except Exception:
            self.conn.terminate()

    async def leave_transaction(self) -> None:
        """End a transaction that the last COMMIT began, so that each following statement commits on its own."""
        if self._begun:
            self._begun = False
            await self.conn.execute("ROLLBACK")  # the transaction is empty

    def _note_warning(self, _conn: object, message: asyncpg.PostgresLogMessage) -> None:
        """Record a warning. asyncpg calls this for each notice and warning, before their statement returns."""
        if getattr(message, "severity_en", None) == "WARNING":
            self._warning = getattr(message, "message", "") or "a warning without text"

    # ---- checks -----------------------------------------------------------------------------------------------

    async def check_writable(self) -> None:
        """Raise an error if the database is read-only, or lacks a table."""
        await self.leave_transaction()
        if not await self.conn.fetchval(_C["can_write"]):
            raise DatabaseUnavailable("It is read-only.", reason="it is read-only")
        await connections.check_tables(self.conn)

    async def check_unlocked(self) -> None:
        """Raise DatabaseUnavailable if another session's lock would block the next batch as well: every device would
        wait for seconds, although /readyz reported ready before each batch."""
        if lock := await self.conn.fetchrow(_Q["locked_by"]):
            raise DatabaseUnavailable(
                f"{lock['relation']} is locked by {lock['holder']}.",
                reason=f"a lock blocks {lock['relation']}",
            )

    async def check_confirmed(self) -> None:
        """Raise DatabaseUnavailable if no synchronous standby confirms a commit: each batch would wait for seconds and
        then fail."""
        if not await self.is_confirmed():
            raise DatabaseUnavailable(
                f"No synchronous standby confirms commits: {self._warning}.",
                reason="no synchronous standby confirms commits",
            )

    async def is_confirmed(self) -> bool:
        """Return whether earlier commits are as durable as synchronous_commit promises. pg_xact_status returns
        "committed" as soon as the primary has committed; if a synchronous standby confirms a later transaction, it has
        the earlier ones too."""
        self._warning = ""
        await self.conn.execute(_C["write_after"])
        return not self._warning


class WriterConnection:
    """The writer's only connection. At most one session exists at a time."""

    def __init__(
        self,
        database: Database,
        readiness: Readiness,
        tracker: DatabaseTracker,
        on_lost: Callable[[], None],
        *,
        noteworthy: Noteworthy = DEFAULT,
    ) -> None:
        self._database = database
        self._readiness = readiness
        self._noteworthy = noteworthy
        self._on_lost = on_lost  # called when a connection ends
        self._session: Session | None = None
        tracker.on_change(self._terminate)

    async def session(self) -> Session:
        """Return the session. If its connection is closed, open a new session, which knows nothing yet."""
        if self._session is None or self._session.conn.is_closed():
            self._session = await self._open()
        return self._session

    async def _open(self) -> Session:
        conn = await self._database.connect(
            application="nexhb writer",
            command_timeout_s=STATEMENT_TIMEOUT_S,
            timeout_s=STATEMENT_TIMEOUT_S,
            statement_timeout=f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
            lock_timeout="3000",
            # A daemon that is suspended within a transaction must not hold its locks forever.
            idle_in_transaction_session_timeout="10000",
        )
        try:
            await connections.use_packed(conn)
        except BaseException:
            conn.terminate()  # without the codecs, it would reject every address
            raise
        conn.add_termination_listener(lambda _: self._on_lost())
        return Session(conn, self._noteworthy)

    def close(self) -> None:
        """End the session."""
        self._terminate()
        self._session = None

    def _terminate(self) -> None:
        """Terminate the connection. `close` calls this, and so does the tracker when it detects another database,
        because this connection still leads to the previous database.
        """
        if self._session is not None:
            self._session.conn.terminate()

    def reset_after(self, error: Exception) -> None:
        """Drop whatever the error has invalidated, so that the next attempt starts clean."""
        kind = classify(error)
        if kind is Kind.NO_PARTITION and self._session is not None:
            self._session.tables.clear()
        if kind in (Kind.LOST, Kind.BUG, Kind.UNFIT):
            self.close()

    # ---- readiness --------------------------------------------------------------------------------------------

    async def probe(self) -> bool:
        """Check the database while there is nothing to write, so that no heartbeat has to wait for a failure. Return
        whether it can be written."""
        try:
            await (await self.session()).check_writable()
        except Exception as error:
            self.close()
            self.report_unavailable(error)
            return False
        return True

    async def recover(self, on_attempt: Callable[[], None]) -> None:
        """Wait until the database can commit again, then report ready. `on_attempt` is called before each attempt."""
        delay_s = 0.1
        while True:
            on_attempt()
            try:
                session = await self.session()
                await session.check_writable()
                await session.check_unlocked()
                await session.check_confirmed()
                break
            except Exception as error:
                _log.info("writer.still_not_ready", error=described(error))
                self.report_unavailable(error)
                self.close()
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RECOVER_WAIT_S)
        self._readiness.clear(Source.DATABASE)
        _log.info("writer.ready_again")

    def report_unavailable(self, error: Exception) -> None:
        """Report not ready until `recover` returns: the intake refuses heartbeats meanwhile."""
        if not self._readiness.reason(Source.DATABASE):
            _log.error("writer.not_ready", error=described(error))
        detail = error.detail if isinstance(error, DatabaseUnavailable) else described(error)
        what = "The database cannot commit:"
        self._readiness.block(Source.DATABASE, f"{what} {reason(error)}.", f"{what} {detail}")
