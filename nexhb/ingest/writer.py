"""The coroutine that commits heartbeats: it writes a batch of all waiting tickets in one transaction, and settles them.
Whatever arrives during a commit is the next batch; there is no delay."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable, described
from nexhb.heartbeat import FieldError, Heartbeat
from nexhb.ingest import commit, in_doubt
from nexhb.ingest.batch import Noteworthy
from nexhb.ingest.connection import WriterConnection
from nexhb.ingest.in_doubt import Doubt, InDoubt
from nexhb.ingest.intake import Intake, Outcome, Ticket, Verdict
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import Kind, classify
from nexhb.postgres.identity import DatabaseTracker
from nexhb.readiness import Readiness, Source

_log = log.get("writer")

RETRY_FOR_S = 6.0  # together with the statement timeout of the last attempt: far less than the agent's timeout of 30 s
RETRYABLE = (Kind.LOST, Kind.TRANSIENT, Kind.NO_PARTITION)
FIRST_RETRY_WAIT_S = 0.02  # the longest wait before the second attempt; doubled for each further attempt
MAX_RETRY_WAIT_S = 1.0
PROBE_S = 5.0  # interval of the connection checks while there is nothing to write
ATTEMPT_S = 30.0  # one attempt, from connection to COMMIT; the tickets expire long before
NO_MEMORY_S = 1.0  # pause of the loop after a MemoryError
# The longest time without progress of a writer that works: an attempt (30 s), ended by its own timer, and the wait for
# the next attempt (1 s). Other steps take less, or about as long: an iteration without work (5 s), a new connection (5
# s, and two lookups of 5 s), and a step of the recovery (a connection, three queries of 5 s, a wait of 2 s: 32 s). The
# rest allows for a slow machine.
MAX_SILENT_S = ATTEMPT_S + 10.0
MAX_UNEXPECTED_FAILURES = 3  # failed batches in a row, before the daemon reports that it is not ready
MAX_TRACEBACKS = 3


class _Replaced(DatabaseUnavailable):
    sentence = "The database was replaced by another one."


class Writer:
    """Commit the heartbeats of the intake on a connection of its own: `run` until cancelled, then `stop`."""

    def __init__(
        self,
        database: Database,
        intake: Intake,
        readiness: Readiness,
        *,
        batch_max: int,
        tracker: DatabaseTracker | None = None,
        noteworthy: Noteworthy = Noteworthy(),  # noqa: B008 - immutable
    ) -> None:
        self._readiness = readiness
        self._tracker = tracker or DatabaseTracker()
        self._connection = WriterConnection(database, readiness, self._tracker, intake.wake, noteworthy=noteworthy)
        self._intake = intake
        self._batch_max = batch_max
        metrics.batch_limit.set(batch_max)
        self._batch_epoch = self._tracker.epoch  # the database's epoch when the batch was taken
        self._doubt: Doubt | None = None  # the last transaction of the current batch, if its outcome is unknown
        self._unexpected_failures = 0  # batches in a row that failed with an unknown error
        self._failed_at = 0.0  # time of the last of these failures, by the event loop's clock
        self._progress_at = time.monotonic()
        self.committed_at: float | None = None  # time of the last commit, in seconds since the epoch

    @property
    def silent_s(self) -> float:
        """Seconds since the writer last made progress; it hangs if they exceed MAX_SILENT_S. Each attempt to reach a
        database that is away counts as progress."""
        return time.monotonic() - self._progress_at

    @property
    def is_silent(self) -> bool:
        """Whether the writer has made no progress for longer than any of its steps may take."""
        return self.silent_s > MAX_SILENT_S

    def _mark_progress(self) -> None:
        self._progress_at = time.monotonic()

    # ---- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit batches until cancelled. Errors of the database are never raised."""
        self._mark_progress()
        await self._probe()  # connect before the first heartbeat needs the connection
        while True:
            try:
                await self._iterate()
            except MemoryError:  # an error outside of a batch: the unanswered tickets expire, and their devices retry
                _log.error("writer.no_memory")
                self._connection.close()
                await asyncio.sleep(NO_MEMORY_S)

    async def _iterate(self) -> None:
        self._mark_progress()
        await self._intake.wait(PROBE_S)
        self._mark_progress()
        if tickets := self._intake.next_batch(self._batch_max):
            await self._settle(tickets)
        else:
            await self._probe()
        if self._readiness.reason(Source.DATABASE):
            await self._connection.recover(on_attempt=self._mark_progress)

    async def _probe(self) -> None:
        if await self._connection.probe() and asyncio.get_running_loop().time() - self._failed_at >= PROBE_S:
            self._clear_unexpected_failures()  # a load balancer has moved the fleet elsewhere: admit it again

    async def stop(self, drain_s: float) -> None:
        """Wait up to `drain_s` until every admitted heartbeat is answered, then close the connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._intake.wait_idle()
        self._intake.fail_all("the daemon stops")
        self._connection.close()

    # ---- a batch ----------------------------------------------------------------------------------------------

    async def _settle(self, tickets: list[Ticket]) -> None:
        """Commit the heartbeats of the tickets, and settle every ticket, whatever happens."""
        # Observed once per batch, for its oldest ticket: none of its heartbeats waited longer.
        metrics.queue_wait.observe(asyncio.get_running_loop().time() - tickets[0].admitted_at)
        heartbeats: list[Heartbeat] = []
        verdicts: list[Verdict] = []
        self._batch_epoch = self._tracker.epoch
        try:
            heartbeats += [heartbeat for ticket in tickets for heartbeat in ticket.heartbeats]
            verdicts = await self._commit_or_split(heartbeats)
            self._clear_unexpected_failures()
        except Exception as error:
            self._handle_unexpected_failure(error, len(heartbeats))
        finally:
            if verdicts:
                self._intake.settle(tickets, verdicts)
            else:
                self._intake.fail(tickets, "internal error")

    def _handle_unexpected_failure(self, error: Exception, heartbeats: int) -> None:
        """Log an unknown error and disconnect. The devices keep the heartbeats and send them again."""
        self._unexpected_failures += 1
        self._failed_at = asyncio.get_running_loop().time()
        # Only the first failures with a traceback: an error that lasts would fill the log.
        write_log = _log.exception if self._unexpected_failures <= MAX_TRACEBACKS else _log.error
        write_log("batch.failed_unexpectedly", heartbeats=heartbeats, error=described(error))
        if self._unexpected_failures >= MAX_UNEXPECTED_FAILURES:
            failures = f"The last {self._unexpected_failures} batches failed unexpectedly"
            self._readiness.block(Source.FAILURES, f"{failures}: {type(error).__name__}; see the log.")
        self._connection.close()

    def _clear_unexpected_failures(self) -> None:
        self._unexpected_failures = 0
        self._readiness.clear(Source.FAILURES)

    async def _commit_or_split(self, heartbeats: Sequence[Heartbeat], *, accepts_empty: bool = False) -> list[Verdict]:
        """Commit the heartbeats and return a verdict for each. Transient errors are retried, and a batch with a bad row
        is split until that row stands alone. `accepts_empty`: the database is known to accept heartbeats without
        content."""
        try:
            return await self._retry(heartbeats)
        except _Replaced as error:  # the tickets were failed already when the other database was detected
            return [Verdict(Outcome.FAILED, error.sentence)] * len(heartbeats)
        except Exception as error:
            kind = classify(error)
            if kind is Kind.DATA and (
                accepts_empty or await self._accepts_without_content({heartbeats[0], heartbeats[-1]})
            ):
                return await self._split(heartbeats, error)
            if kind in (Kind.BUG, Kind.DATA):
                raise
            self._connection.report_unavailable(error)
            return [Verdict(Outcome.FAILED, "the database cannot commit")] * len(heartbeats)

    async def _split(self, heartbeats: Sequence[Heartbeat], error: Exception) -> list[Verdict]:
        if len(heartbeats) == 1:
            if not await self._accepts_without_content(heartbeats):
                _log.error("heartbeat.not_stored", device_id=heartbeats[0].device_id, error=str(error))
                return [Verdict(Outcome.FAILED, "the database cannot store it")]
            _log.warning("heartbeat.refused_by_database", device_id=heartbeats[0].device_id, error=str(error))
            return [Verdict(Outcome.REFUSED, errors=(FieldError("", f"cannot be stored: {error}"),))]
        middle = len(heartbeats) // 2
        first = await self._commit_or_split(heartbeats[:middle], accepts_empty=True)
        return first + await self._commit_or_split(heartbeats[middle:], accepts_empty=True)

    async def _accepts_without_content(self, heartbeats: Iterable[Heartbeat]) -> bool:
        """Return whether the database accepts one of these heartbeats without its content. If it does not, the content
        is not the cause: a ledger that overflows, a foreign trigger, a bug."""
        for heartbeat in heartbeats:
            try:
                await commit.try_without_content(await self._connection.session(), heartbeat)
            except Exception as error:
                _log.warning("heartbeat.bare_refused", error=described(error))
                self._connection.reset_after(error)
            else:
                return True
        return False

    # ---- attempts ---------------------------------------------------------------------------------------------

    async def _retry(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        """Attempt to commit the heartbeats until it succeeds, an error is not RETRYABLE, or RETRY_FOR_S have passed
        since the beginning of the first attempt."""
        began, attempts, max_wait_s = time.monotonic(), 0, FIRST_RETRY_WAIT_S
        try:
            while True:
                try:
                    return await self._attempt(heartbeats)
                except _Replaced:
                    raise
                except Exception as error:
                    attempts += 1
                    kind = classify(error)
                    if kind not in RETRYABLE or time.monotonic() - began >= RETRY_FOR_S:
                        raise
                    metrics.write_retries.labels(kind=kind.value).inc()
                    _log.warning("batch.retry", kind=kind.value, attempt=attempts, error=described(error))
                await asyncio.sleep(random.uniform(0, max_wait_s))  # noqa: S311 - no secret
                max_wait_s = min(max_wait_s * 2, MAX_RETRY_WAIT_S)
        finally:
            self._doubt = None

    async def _attempt(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        self._mark_progress()
        session = await self._connection.session()
        self._mark_progress()
        if self._batch_epoch != self._tracker.epoch:
            raise _Replaced  # these device numbers belong to the previous database
        # Each statement has its own timeout. But asyncpg waits without limit for the confirmation of a cancellation,
        # and there may be many days to create.
        timer = asyncio.get_running_loop().call_later(ATTEMPT_S, session.conn.terminate)
        try:
            if self._doubt is not None:
                committed = await in_doubt.resolve(session, self._doubt)
                self._doubt = None
                if committed:
                    return committed
            started = time.perf_counter()
            verdicts = await commit.write(session, heartbeats, self._intake)
        except Exception as error:
            if isinstance(error, InDoubt):
                self._doubt = error.doubt
            self._connection.reset_after(error)
            raise
        finally:
            timer.cancel()
        metrics.hb_write_latency_ms.observe((time.perf_counter() - started) * 1000)
        metrics.batch_rows.observe(len(heartbeats))
        self.committed_at = time.time()
        metrics.last_commit.set(self.committed_at)
        return verdicts
