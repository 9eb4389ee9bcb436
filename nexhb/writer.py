"""The one coroutine that commits. Takes every waiting ticket, makes the plan, runs COPY and upsert in one
transaction, settles every ticket. What arrived while one batch commits is the next batch: there is no linger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import date

import asyncpg
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from nexhb import batch, db, log, metrics, partitions, sql, staging
from nexhb.batch import HISTORY_COLUMNS, Key, Plan, RecentKeys
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable, DayMissing
from nexhb.identity import Lives
from nexhb.intake import DEDUPLICATED, WRITTEN, Intake, Outcome, Ticket, Verdict
from nexhb.pgerrors import Kind, classify, reason
from nexhb.staging import Labels
from nexhb.wire import FieldError, Heartbeat

_D = sql.queries("db")
_Q = sql.queries("writer")
_CAN_WRITE = sql.queries("db")["can_write"]
_log = log.get("writer")

STATEMENT_TIMEOUT_S = 5.0
RETRY_FOR_S = 6.0  # with the last attempt's statement timeout still far inside the agent's 30 s
PROBE_S = 5.0  # with nothing to write, how often the connection is tried
RECENT_KEYS = 50_000  # a generation: 25 minutes of 2,000 devices, 4 MB
ATTEMPT_S = 30.0  # one attempt from its connection to its COMMIT; whoever waited was answered long before
RECOVER_WAIT_S = 2.0  # between two looks for a database that is away, at most
NO_MEMORY_S = 1.0  # until the loop goes on that had none
# The longest that a writer which lives leaves no mark: an attempt (30 s), cut by its own timer, and the wait for the
# next (1 s). Shorter are a turn with nothing to do (5 s), a new connection (5 s, and two lookups of 5 s), and a step
# of the recovery (a connection, three queries of 5 s, a wait of 2 s: 32 s). The rest is for a slow machine.
SILENT_MOST_S = ATTEMPT_S + 10.0
UNFORESEEN_MOST = 3  # in a row, and the daemon says that it is not ready
TRACEBACKS = 3
NO_LEDGER: tuple[Sequence[object], ...] = ([], [], [])


class _UndoneError(Exception):
    """Every statement went through, and nothing of it is to be kept."""


class _InDoubt(DatabaseUnavailable):
    sentence = "COMMIT was not answered, or not confirmed by a synchronous standby."

    def __init__(
        self, xid: str, verdicts: list[Verdict], plan: Plan, heartbeats: Sequence[Heartbeat], detail: str
    ) -> None:
        self.xid = xid
        self.verdicts = verdicts
        self.plan = plan
        written = (h for h, verdict in zip(heartbeats, verdicts, strict=True) if verdict is WRITTEN)
        self.witness = next(written, None)  # a row of it: if that is in, all of it is
        super().__init__(detail)


class _Replaced(DatabaseUnavailable):
    sentence = "The database was replaced by another one."


class Writer:
    """Owns its connection. `run` is the coroutine; `stop` drains it."""

    def __init__(self, database: Database, intake: Intake, *, batch_max: int, lives: Lives | None = None) -> None:
        self._database = database
        self._lives = lives or Lives()
        self._lives.on_change(self._leave)
        self._life = self._lives.number  # in which the batch in hand was taken
        self._intake = intake
        self._batch_max = batch_max
        metrics.batch_limit.set(batch_max)
        self._conn: Connection | None = None
        self._recent = RecentKeys(RECENT_KEYS)
        self._labels = Labels()
        self._tables: dict[date, str] = {}
        self._gone: dict[date, str] = {}  # day → why it has no partition any more; asked anew for each batch
        self._begun = False  # a transaction is open already, and nothing is in it
        self._warning = ""  # what PostgreSQL last warned of on this connection
        self._doubt: _InDoubt | None = None
        self._unforeseen = 0  # batches in a row that failed for no known reason
        self._failed_at = 0.0  # the last of them, by the event loop's clock
        self._marked_at = time.monotonic()
        self.committed_at: float | None = None  # seconds since the epoch; when a batch was last committed

    @property
    def silent_s(self) -> float:
        """Seconds since it last came a step further; more than SILENT_MOST_S: it hangs. Waiting for a database that is
        away is a row of steps."""
        return time.monotonic() - self._marked_at

    def _mark(self) -> None:
        self._marked_at = time.monotonic()

    # ---- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit batches until cancelled. Never raises for what the database does."""
        self._mark()
        await self._probe()  # connected before the first heartbeat needs it
        while True:
            try:
                await self._turn()
            except MemoryError:  # outside of a batch; what is unanswered now expires, and is sent again
                _log.error("writer.no_memory")
                await self._disconnect()
                await asyncio.sleep(NO_MEMORY_S)

    async def _turn(self) -> None:
        self._mark()
        await self._intake.wait(PROBE_S)
        self._mark()
        if tickets := self._intake.take(self._batch_max):
            await self._write(tickets)
        else:
            await self._probe()
        if self._intake.closed_because:
            await self._recover()

    async def stop(self, drain_s: float) -> None:
        """Wait until everything admitted is answered, at most `drain_s`; then close the connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._intake.idle()
        self._intake.fail_all("the daemon stops")
        await self._disconnect()

    async def _write(self, tickets: list[Ticket]) -> None:
        # Of the oldest: once a batch, and no heartbeat of it waited longer.
        metrics.queue_wait.observe(asyncio.get_running_loop().time() - tickets[0].admitted_at)
        heartbeats: list[Heartbeat] = []
        verdicts: list[Verdict] = []
        self._life = self._lives.number
        try:
            heartbeats += [heartbeat for ticket in tickets for heartbeat in ticket.heartbeats]
            verdicts = await self._commit(heartbeats)
            self._all_foreseen()
        except Exception as error:
            await self._not_foreseen(error, len(heartbeats))
        finally:
            if verdicts:
                self._intake.settle(tickets, verdicts)
            else:
                self._intake.fail(tickets, "internal error")

    async def _not_foreseen(self, error: Exception, heartbeats: int) -> None:
        """Nobody knows what to do about this one. The devices keep what they sent and come again."""
        self._unforeseen += 1
        self._failed_at = asyncio.get_running_loop().time()
        # One that lasts would fill the log with what it said already.
        tell = _log.exception if self._unforeseen <= TRACEBACKS else _log.error
        tell("batch.failed_unexpectedly", heartbeats=heartbeats, error=f"{type(error).__name__}: {error}")
        if self._unforeseen >= UNFORESEEN_MOST:
            self._intake.failing_because = (
                f"The last {self._unforeseen} batches failed unexpectedly: {type(error).__name__}; see the log."
            )
        await self._disconnect()

    def _all_foreseen(self) -> None:
        self._unforeseen = 0
        self._intake.failing_because = ""

    async def _commit(self, heartbeats: Sequence[Heartbeat], *, sound: bool = False) -> list[Verdict]:
        """One verdict a heartbeat. Retries what is transient; splits a batch until a bad row stands alone. `sound`: the
        database takes heartbeats in which nothing can be wrong."""
        try:
            return await self._patiently(heartbeats)
        except _Replaced as error:  # answered already, by whoever found the other database
            return [Verdict(Outcome.FAILED, error.sentence)] * len(heartbeats)
        except Exception as error:
            kind = classify(error)
            if kind is Kind.DATA and (sound or await self._takes_bare({heartbeats[0], heartbeats[-1]})):
                return await self._split(heartbeats, error)
            if kind in (Kind.BUG, Kind.DATA):
                raise
            self._close_intake(error)
            return [Verdict(Outcome.FAILED, "the database cannot commit")] * len(heartbeats)

    async def _split(self, heartbeats: Sequence[Heartbeat], error: Exception) -> list[Verdict]:
        if len(heartbeats) == 1:
            if not await self._takes_bare(heartbeats):
                _log.error("heartbeat.not_stored", device_id=heartbeats[0].device_id, error=str(error))
                return [Verdict(Outcome.FAILED, "the database cannot store it")]
            _log.warning("heartbeat.refused_by_database", device_id=heartbeats[0].device_id, error=str(error))
            return [Verdict(Outcome.REFUSED, errors=(FieldError("", f"cannot be stored: {error}"),))]
        middle = len(heartbeats) // 2
        first = await self._commit(heartbeats[:middle], sound=True)
        return first + await self._commit(heartbeats[middle:], sound=True)

    async def _takes_bare(self, heartbeats: Iterable[Heartbeat]) -> bool:
        """Whether the database takes one of these without anything that its device said, in a transaction that is
        rolled back. Where it does not, no value is to blame: a ledger that overflows, somebody's trigger, a bug."""
        for heartbeat in heartbeats:
            bare = [batch.bare(heartbeat)]
            try:
                conn = await self._connection()
                await self._outside(conn)
                await self._labels.learn(conn, [bare[0].label])
                await self._transaction(conn, bare, batch.make(bare, RecentKeys(1)), self._copy_and_undo)
            except _UndoneError:
                return True
            except Exception as error:
                _log.warning("heartbeat.bare_refused", error=f"{type(error).__name__}: {error}")
                await self._after(error)
        return False

    async def _copy_and_undo(self, conn: Connection, heartbeats: Sequence[Heartbeat], plan: Plan) -> set[Key]:
        await self._copy_through_stage(conn, heartbeats, plan)
        raise _UndoneError

    async def _patiently(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        began = time.monotonic()
        try:
            return await self._attempt(heartbeats)
        except Exception as error:
            return await self._again(heartbeats, error, began)
        finally:
            self._doubt = None

    async def _again(self, heartbeats: Sequence[Heartbeat], error: Exception, began: float) -> list[Verdict]:
        """Behind a first attempt, which began then and failed with `error`. That one is not tenacity's, which would
        take a sixth of what a lone heartbeat costs."""
        failed = [error]

        async def attempt() -> list[Verdict]:
            if failed:
                raise failed.pop()
            return await self._attempt(heartbeats)

        retrying = AsyncRetrying(
            retry=retry_if_exception(_worth_another_try),
            stop=lambda _: time.monotonic() - began >= RETRY_FOR_S,
            wait=wait_random_exponential(multiplier=0.02, max=1),
            before_sleep=_say_retry,
            reraise=True,
        )
        verdicts: list[Verdict] = await retrying(attempt)
        return verdicts

    # ---- one attempt ------------------------------------------------------------------------------------------

    async def _attempt(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        self._mark()
        conn = await self._connection()
        self._mark()
        if self._life != self._lives.number:
            raise _Replaced  # these device numbers are the other database's
        # Each statement has its own bound; a cancellation that nobody answers has none in asyncpg, and days to be made
        # may be many.
        timer = asyncio.get_running_loop().call_later(ATTEMPT_S, conn.terminate)
        impossible: list[Verdict | None] = []
        try:
            if self._doubt and (verdicts := await self._resolve_doubt(conn, self._doubt)):
                return verdicts
            started = time.perf_counter()
            possible, impossible = await self._without_missing_days(conn, heartbeats)
            verdicts = await self._transact(conn, possible) if possible else []
            if impossible:
                verdicts = _merge(impossible, verdicts)
        except _InDoubt as doubt:
            # `impossible` is empty where the doubt is an earlier attempt's, which has been merged already.
            doubt.verdicts = _merge(impossible, doubt.verdicts) if impossible else doubt.verdicts
            await self._after(doubt)
            raise
        except Exception as error:
            await self._after(error)
            raise
        finally:
            timer.cancel()
        metrics.hb_write_latency_ms.observe((time.perf_counter() - started) * 1000)
        metrics.batch_rows.observe(len(heartbeats))
        self.committed_at = time.time()
        metrics.last_commit.set(self.committed_at)
        return verdicts

    async def _transact(self, conn: Connection, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        plan = batch.make(heartbeats, self._recent)
        labels = {h.label for h in heartbeats}
        if not labels <= self._labels.numbers.keys():
            await self._outside(conn)
            await self._labels.learn(conn, labels)
        try:
            return await self._transaction(conn, heartbeats, plan, self._copy)
        except Exception as error:
            if classify(error) is not Kind.DUPLICATE:
                raise
        metrics.staging_batches.inc()
        return await self._transaction(conn, heartbeats, plan, self._copy_through_stage)

    async def _transaction(
        self,
        conn: Connection,
        heartbeats: Sequence[Heartbeat],
        plan: Plan,
        copy: Callable[[Connection, Sequence[Heartbeat], Plan], Awaitable[set[Key]]],
    ) -> list[Verdict]:
        await self._begin(conn)
        try:
            # The status first, in every way: it takes PostgreSQL longest, and meanwhile the daemon takes in what has
            # come since the last batch was answered. Behind COPY it would have nothing left to do in that time.
            ledger = batch.ledger_columns(heartbeats, plan, plan.keys)
            xid, upserted = await self._put_statuses(conn, plan, ledger)
            written = await copy(conn, heartbeats, plan)
            if len(written) < len(plan.keys):
                await conn.execute(_Q["correct_ledger"], *batch.ledger_correction(plan, written))
        except BaseException:
            try:
                await conn.execute("ROLLBACK")
            except Exception:
                conn.terminate()  # the next batch must not find half of this one
            raise
        verdicts = _verdicts(heartbeats, plan, written)
        try:
            await self._end(conn)
        except Exception as error:
            if classify(error) is Kind.LOST:
                detail = getattr(error, "detail", "") or f"{type(error).__name__}: {error}."
                raise _InDoubt(xid, verdicts, plan, heartbeats, detail) from error
            raise
        self._remember(plan)
        self._count_late(written, plan)
        metrics.last_status_upserts.inc(upserted)
        return verdicts

    async def _put_statuses(
        self, conn: Connection, plan: Plan, ledger: tuple[Sequence[object], ...]
    ) -> tuple[str, int]:
        """Write the statuses, what devices say of themselves where it changed, and the ledger; the transaction's id,
        and how many rows were written."""
        xid, written = "", 0
        for statuses in plan.rounds:
            row = await conn.fetchrow(_Q["upsert_last_status"], *batch.status_columns(statuses, plan.heard), *ledger)
            assert row is not None  # noqa: S101 - an aggregate has one row
            if row["facts_changed"]:
                await conn.execute(_Q["update_facts"], *batch.facts_columns(statuses, set(row["facts_changed"])))
            xid, written, ledger = row["xid"], written + row["written"], NO_LEDGER
        return xid, written

    async def _begin(self, conn: Connection) -> None:
        if not self._begun:
            await conn.execute("BEGIN")
        self._begun = False

    async def _end(self, conn: Connection) -> None:
        """Commit. Where a batch waits, its transaction begins with the same message: in the time of a BEGIN of its own
        the daemon would take in what has come, and PostgreSQL would have nothing to do.

        Raises DatabaseUnavailable where COMMIT succeeded with a warning: PostgreSQL stopped waiting for a synchronous
        standby, because of a timeout or somebody's pg_cancel_backend, and the transaction is on the primary alone."""
        more = self._intake.has_waiting
        self._warning = ""
        await conn.execute("COMMIT AND CHAIN" if more else "COMMIT")
        self._begun = more
        if self._warning:
            raise DatabaseUnavailable(f"COMMIT succeeded with a warning: {self._warning}.")

    async def _outside(self, conn: Connection) -> None:
        """What follows is in no transaction, and lasts by itself."""
        if self._begun:
            self._begun = False
            await conn.execute("ROLLBACK")  # of nothing

    async def _copy(self, conn: Connection, heartbeats: Sequence[Heartbeat], plan: Plan) -> set[Key]:
        """Straight into each day's partition; a key that is there already fails it (23505)."""
        written = await self._keep_late(conn, heartbeats, plan)
        for day, rows in plan.rows.items():
            if day in self._gone:
                continue
            try:
                await conn.copy_records_to_table(
                    self._tables[day], records=self._records(heartbeats, rows), columns=HISTORY_COLUMNS
                )
            except asyncpg.UndefinedTableError as error:
                raise DayMissing(f"{self._tables[day]}.") from error
            written.update(key for key, _ in rows)
        return written

    async def _copy_through_stage(self, conn: Connection, heartbeats: Sequence[Heartbeat], plan: Plan) -> set[Key]:
        """Through a temporary table, dropping the keys that are there already; what is new, by key."""
        written = await self._keep_late(conn, heartbeats, plan)
        rows = [row for day, rows in plan.rows.items() if day not in self._gone for row in rows]
        await self._stage(conn, heartbeats, rows)
        return written | await staging.insert_staged(conn)

    async def _stage(self, conn: Connection, heartbeats: Sequence[Heartbeat], rows: Iterable[tuple[Key, int]]) -> None:
        await staging.stage(conn, self._records(heartbeats, rows))

    async def _keep_late(self, conn: Connection, heartbeats: Sequence[Heartbeat], plan: Plan) -> set[Key]:
        """Heartbeats whose day is gone, into their own table; what was new there, by key."""
        kept: set[Key] = set()
        for day in plan.rows.keys() & self._gone.keys():
            await self._stage(conn, heartbeats, plan.rows[day])
            kept |= staging.keys(await conn.fetch(_Q["keep_late"], self._gone[day]))
            await staging.clear(conn)
        return kept

    def _count_late(self, written: set[Key], plan: Plan) -> None:
        for day in plan.rows.keys() & self._gone.keys():
            late = sum(key in written for key, _ in plan.rows[day])
            metrics.late_heartbeats.labels(reason=self._gone[day]).inc(late)
            _log.warning("heartbeat.late", day=str(day), heartbeats=late, reason=self._gone[day])

    def _records(self, heartbeats: Sequence[Heartbeat], rows: Iterable[tuple[Key, int]]) -> list[tuple[object, ...]]:
        numbers = self._labels.numbers
        return [batch.history_row(h, numbers[h.label]) for h in (heartbeats[index] for _, index in rows)]

    # ---- what an attempt needs ----------------------------------------------------------------------------------

    async def _connection(self) -> Connection:
        if self._conn is None or self._conn.is_closed():
            conn = await self._database.connect(
                application="nexhb writer",
                command_timeout_s=STATEMENT_TIMEOUT_S,
                timeout_s=STATEMENT_TIMEOUT_S,
                statement_timeout=f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
                lock_timeout="3000",
                # A daemon that is stopped in mid-transaction must not hold its locks for ever.
                idle_in_transaction_session_timeout="10000",
            )
            try:
                await db.use_packed(conn)
            except BaseException:
                conn.terminate()  # half ready, it would take every address for a bad one
                raise
            conn.add_termination_listener(lambda _: self._intake.wake())
            conn.add_log_listener(self._note_warning)
            self._conn = conn
            self._begun = False
            self._forget()
        return self._conn

    def _forget(self) -> None:
        """What was learned on one connection is not known on the next: it may lead to another database, or to this one
        at an earlier moment."""
        self._recent = RecentKeys(RECENT_KEYS)
        self._labels = Labels()
        self._tables = {}

    def _leave(self) -> None:
        """Another database was found: a connection that is still there leads to the one before."""
        if self._conn is not None:
            self._conn.terminate()

    def _note_warning(self, _conn: object, message: asyncpg.PostgresLogMessage) -> None:
        """Called by asyncpg for each notice and warning, before the statement that it belongs to returns."""
        if getattr(message, "severity_en", None) == "WARNING":
            self._warning = getattr(message, "message", "") or "a warning without a text"

    async def _without_missing_days(
        self, conn: Connection, heartbeats: Sequence[Heartbeat]
    ) -> tuple[Sequence[Heartbeat], list[Verdict | None]]:
        """Heartbeats whose day has its partition, made now if need be, or is gone for good; and a verdict for each of
        the others."""
        missing = {h.ts.date() for h in heartbeats} - self._tables.keys()
        self._gone = {}
        if missing:
            await self._outside(conn)
        for day in sorted(missing):
            try:
                self._tables |= await partitions.ensure(conn, [day])
                if day not in self._tables and (reason := await partitions.gone(conn, day)):
                    self._gone[day] = reason
            except Exception as error:
                if classify(error) in (Kind.LOST, Kind.UNFIT):
                    raise
        still = missing - self._tables.keys() - self._gone.keys()
        if not still:
            return heartbeats, []
        failed = Verdict(Outcome.FAILED, "its day has no partition")
        return (
            [h for h in heartbeats if h.ts.date() not in still],
            [failed if h.ts.date() in still else None for h in heartbeats],
        )

    def _remember(self, plan: Plan) -> None:
        """Only what is committed: a batch that was lost must be able to come again."""
        self._recent.add(plan.keys)

    # ---- when it goes wrong -------------------------------------------------------------------------------------

    async def _after(self, error: Exception) -> None:
        """Leave the writer so that the next attempt starts clean."""
        kind = classify(error)
        if isinstance(error, _InDoubt):
            self._doubt = error
        if kind is Kind.NO_PARTITION:
            self._tables.clear()
        if kind in (Kind.LOST, Kind.BUG, Kind.UNFIT):
            await self._disconnect()

    async def _resolve_doubt(self, conn: Connection, doubt: _InDoubt) -> list[Verdict] | None:
        """What became of the transaction whose COMMIT was never answered. None: it is not in, do it again.

        Raises the doubt again while the transaction is still in progress, or where a synchronous standby does not
        confirm it.
        """
        outcome = await self._outcome(conn, doubt)
        metrics.commits_in_doubt.labels(outcome=str(outcome)).inc()
        _log.warning("commit.in_doubt", xid=doubt.xid, outcome=outcome)
        if outcome == "in progress":
            raise doubt
        if outcome == "committed" and not await self._is_confirmed(conn):
            metrics.commits_in_doubt.labels(outcome="unconfirmed").inc()
            raise doubt
        self._doubt = None
        if outcome != "committed":
            return None  # aborted, or forgotten; or too old to know, and then the key makes a second writing harmless
        self._remember(doubt.plan)
        return doubt.verdicts

    async def _is_confirmed(self, conn: Connection) -> bool:
        """Whether what is committed is as durable as synchronous_commit promises. pg_xact_status says "committed" as
        soon as the primary has it; a later transaction that a synchronous standby confirms proves the earlier ones."""
        self._warning = ""
        await conn.execute(_D["write_after"])
        return not self._warning

    async def _outcome(self, conn: Connection, doubt: _InDoubt) -> str | None:
        """What PostgreSQL says of the transaction, as far as it can be believed. A crash forgets the number of one of
        which nothing was on disk: it is one of the future then, or another's, whose COMMIT is not ours."""
        try:
            outcome: str | None = await conn.fetchval(_Q["xact_status"], doubt.xid)
        except asyncpg.InvalidParameterValueError:
            return "forgotten"
        witness = doubt.witness
        if outcome == "committed" and witness is not None:
            key = (witness.device_no, witness.bucket, witness.ts, witness.received_at)
            return outcome if await conn.fetchval(_Q["is_stored"], *key) else "forgotten"
        return outcome

    def _close_intake(self, error: Exception) -> None:
        if not self._intake.closed_because:
            _log.error("writer.not_ready", error=f"{type(error).__name__}: {error}")
        detail = error.detail if isinstance(error, DatabaseUnavailable) else f"{type(error).__name__}: {error}"
        self._intake.closed_because = f"The database cannot commit: {reason(error)}."
        self._intake.closed_in_full = f"The database cannot commit: {detail}"
        metrics.ready.set(0)

    async def _probe(self) -> None:
        """With nothing to write: is the database there? A fleet's first heartbeat should not have to find out."""
        try:
            await self._check_writable()
            if asyncio.get_running_loop().time() - self._failed_at >= PROBE_S:
                self._all_foreseen()  # whoever asks /readyz has sent the fleet elsewhere: let it try again
        except Exception as error:
            await self._disconnect()
            self._close_intake(error)

    async def _check_writable(self) -> None:
        """Raise where the database is not there, or takes no writes."""
        conn = await self._connection()
        await self._outside(conn)
        if not await conn.fetchval(_CAN_WRITE):
            raise DatabaseUnavailable("It is read-only.", reason="it is read-only")
        await db.check_tables(conn)

    async def _check_unlocked(self) -> None:
        """Raise where somebody's lock would hold up the next batch too: it would wait for seconds, and so would every
        device, while /readyz said ready in between."""
        conn = await self._connection()
        if held := await conn.fetchrow(_Q["locked_by"]):
            raise DatabaseUnavailable(
                f"{held['relation']} is locked by {held['holder']}.",
                reason=f"a lock holds up {held['relation']}",
            )

    async def _check_confirmed(self) -> None:
        """Raise where a commit would be on the primary alone: each batch would wait for seconds and fail."""
        if not await self._is_confirmed(await self._connection()):
            raise DatabaseUnavailable(
                f"A synchronous standby does not confirm: {self._warning}.",
                reason="its synchronous standby does not confirm",
            )

    async def _recover(self) -> None:
        """Until the database answers again; the intake stays closed meanwhile."""
        delay_s = 0.1
        while True:
            self._mark()
            try:
                await self._check_writable()
                await self._check_unlocked()
                await self._check_confirmed()
                break
            except Exception as error:
                _log.info("writer.still_not_ready", error=f"{type(error).__name__}: {error}")
                self._close_intake(error)
                await self._disconnect()
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RECOVER_WAIT_S)
        self._intake.closed_because = self._intake.closed_in_full = ""
        metrics.ready.set(1)
        _log.info("writer.ready_again")

    async def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.terminate()


def _worth_another_try(error: BaseException) -> bool:
    return not isinstance(error, _Replaced) and classify(error) in (Kind.LOST, Kind.TRANSIENT, Kind.NO_PARTITION)


def _say_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    kind = classify(error).value if error else ""
    metrics.write_retries.labels(kind=kind).inc()
    _log.warning("batch.retry", kind=kind, attempt=state.attempt_number, error=f"{type(error).__name__}: {error}")


def _verdicts(heartbeats: Sequence[Heartbeat], plan: Plan, written: set[Key]) -> list[Verdict]:
    if len(written) == len(heartbeats):
        return [WRITTEN] * len(heartbeats)
    verdicts = [DEDUPLICATED] * len(heartbeats)
    for rows in plan.rows.values():
        for key, index in rows:
            if key in written:
                verdicts[index] = WRITTEN
    return verdicts


def _merge(verdicts: list[Verdict | None], possible: list[Verdict]) -> list[Verdict]:
    rest = iter(possible)
    return [verdict or next(rest) for verdict in verdicts]
