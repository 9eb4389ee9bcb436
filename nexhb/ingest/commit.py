"""The transaction of one plan: BEGIN, the last statuses with the ledger, the rows with COPY, COMMIT."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date

import asyncpg

from nexhb import log, metrics, partitions
from nexhb.errors import DayMissing, described
from nexhb.heartbeat import HISTORY_COLUMNS, Heartbeat, Key, history_row
from nexhb.ingest import batch, ledger, staging
from nexhb.ingest.batch import Plan, RecentKeys
from nexhb.ingest.connection import Session
from nexhb.ingest.in_doubt import Doubt, InDoubt
from nexhb.ingest.intake import DEDUPLICATED, WRITTEN, Intake, Outcome, Verdict
from nexhb.postgres import sql
from nexhb.postgres.codecs import pack_moment
from nexhb.postgres.errors import Kind, classify

_Q = sql.queries("writer")
_log = log.get("writer")

NO_LEDGER: tuple[Sequence[object], ...] = ([], [], [])


async def write(session: Session, heartbeats: Sequence[Heartbeat], intake: Intake) -> list[Verdict]:
    """Commit the heartbeats in one transaction, and return a verdict for each of them. If a ticket waits in `intake` at
    that time, COMMIT also begins the next transaction. Raise InDoubt if COMMIT is not answered."""
    late_days, missing_days = await _ensure_days(session, heartbeats)
    failed: list[Verdict | None] = []
    if missing_days:
        without_day = Verdict(Outcome.FAILED, "the heartbeat's day has no partition")
        storable = [h for h in heartbeats if h.ts.date() not in missing_days]
        if not storable:
            return [without_day] * len(heartbeats)
        failed = [without_day if h.ts.date() in missing_days else None for h in heartbeats]
        heartbeats = storable
    plan = batch.make_plan(heartbeats, session.recent)
    labels = {h.label for h in heartbeats}
    if not labels <= session.labels.numbers.keys():
        await session.leave_transaction()
        await session.labels.learn(session.conn, labels)
    transaction = _Transaction(session, heartbeats, plan, late_days, failed)
    try:
        return await transaction.run(transaction.copy, intake)
    except Exception as error:
        if classify(error) is not Kind.DUPLICATE:
            raise
    metrics.staging_batches.inc()
    return await transaction.run(transaction.copy_through_stage, intake)


async def try_without_content(session: Session, heartbeat: Heartbeat) -> None:
    """Write the heartbeat without its content, in a transaction that is rolled back. Raise the database's error if the
    database rejects the heartbeat.
    """
    empty = [batch.without_content(heartbeat)]
    day = heartbeat.ts.date()
    await session.leave_transaction()
    await session.labels.learn(session.conn, [empty[0].label])
    late_days = {}
    if day not in session.tables and (reason := await partitions.reason_not_to_create(session.conn, day)):
        late_days[day] = reason
    await _Transaction(session, empty, batch.make_plan(empty, RecentKeys(1)), late_days).run_and_roll_back()


async def _ensure_days(session: Session, heartbeats: Sequence[Heartbeat]) -> tuple[dict[date, str], set[date]]:
    """Find or create the partition of each day. Return the days that must have no partition, because they have been
    archived or dropped, with the reason; and the days whose partition could not be created.
    """
    missing = {h.ts.date() for h in heartbeats} - session.tables.keys()
    late_days: dict[date, str] = {}
    if missing:
        await session.leave_transaction()
    for day in sorted(missing):
        try:
            session.tables |= await partitions.ensure(session.conn, [day])
            if day not in session.tables and (reason := await partitions.reason_not_to_create(session.conn, day)):
                late_days[day] = reason
        except Exception as error:
            if classify(error) in (Kind.LOST, Kind.UNFIT):
                raise
    return late_days, missing - session.tables.keys() - late_days.keys()


@dataclass(frozen=True, slots=True)
class _Transaction:
    session: Session
    heartbeats: Sequence[Heartbeat]
    plan: Plan
    late_days: Mapping[date, str]  # day → why it must have no partition
    failed: Sequence[Verdict | None] = ()  # verdicts of heartbeats that are not written, as in _merge

    async def run(self, copy: Callable[[], Awaitable[set[Key]]], intake: Intake) -> list[Verdict]:
        """Commit the plan, and return the verdicts of the whole batch. `copy` writes the rows."""
        session = self.session
        await session.begin()
        try:
            xid, upserted, written = await self._fill(copy)
        except BaseException:
            await session.roll_back()
            raise
        verdicts = self._verdicts(written)
        try:
            await session.commit(chain=intake.has_waiting)
        except Exception as error:
            if classify(error) is not Kind.LOST:
                raise
            detail = getattr(error, "detail", "") or f"{described(error)}."
            keys = frozenset(self.plan.keys)
            raise InDoubt(Doubt(xid, tuple(verdicts), keys, self._witness(written), detail)) from error
        # Not before the commit: devices must be able to send a lost batch again.
        session.recent.add(self.plan.keys)
        self._count_late(written)
        metrics.last_status_upserts.inc(upserted)
        return verdicts

    async def run_and_roll_back(self) -> None:
        """Execute every statement but COMMIT."""
        await self.session.begin()
        try:
            await self._fill(self.copy_through_stage)
        finally:
            await self.session.roll_back()

    async def _fill(self, copy: Callable[[], Awaitable[set[Key]]]) -> tuple[str, int, set[Key]]:
        """Write the last statuses, the device facts that changed, the ledger and the rows. Return the id of the
        transaction, the number of statuses written, and the keys of the new rows.

        The statuses come first: they take PostgreSQL longest, and meanwhile the daemon reads the requests that have
        arrived since the last batch was answered. If they came after COPY, the daemon would have nothing left to do in
        that time."""
        conn, plan = self.session.conn, self.plan
        counts = ledger.counts(self.heartbeats, plan, plan.keys)
        xid, upserted = "", 0
        for statuses in plan.rounds:
            columns = batch.status_columns(statuses, plan.last_received)
            row = await conn.fetchrow(_Q["upsert_last_status"], *counts, *self.session.noteworthy, *columns)
            assert row is not None  # noqa: S101 - an aggregate has one row
            if row["facts_changed"]:
                await conn.execute(_Q["update_facts"], *batch.facts_columns(statuses, set(row["facts_changed"])))
            xid, upserted, counts = row["xid"], upserted + row["written"], NO_LEDGER
        written = await copy()
        if len(written) < len(plan.keys):
            await conn.execute(_Q["correct_ledger"], *ledger.correction(plan, written))
        return xid, upserted, written

    # ---- the rows ---------------------------------------------------------------------------------------------

    async def copy(self) -> set[Key]:
        """Copy the rows directly into the partition of each day; an existing key makes the COPY fail (23505)."""
        written = await self._keep_late() if self.late_days else set()
        for day, rows in self.plan.rows.items():
            if day in self.late_days:
                continue
            table = self.session.tables[day]
            try:
                await self.session.conn.copy_records_to_table(
                    table, records=self._records(rows), columns=HISTORY_COLUMNS
                )
            except asyncpg.UndefinedTableError as error:
                raise DayMissing(f"{table}.") from error
            written.update(key for key, _ in rows)
        return written

    async def copy_through_stage(self) -> set[Key]:
        """Insert the rows through a temporary table, skipping existing keys; return the keys of the new rows."""
        written = await self._keep_late() if self.late_days else set()
        rows = [row for day, rows in self.plan.rows.items() if day not in self.late_days for row in rows]
        await staging.stage(self.session.conn, self._records(rows))
        return written | await staging.insert_staged(self.session.conn)

    async def _keep_late(self) -> set[Key]:
        """Insert heartbeats whose day has been archived or dropped into late_heartbeats; return the keys of the new
        rows."""
        conn = self.session.conn
        kept: set[Key] = set()
        for day in self.plan.rows.keys() & self.late_days.keys():
            await staging.stage(conn, self._records(self.plan.rows[day]))
            kept |= staging.keys_of(await conn.fetch(_Q["keep_late"], self.late_days[day]))
            await staging.clear(conn)
        return kept

    def _records(self, rows: Iterable[tuple[Key, int]]) -> list[tuple[object, ...]]:
        numbers = self.session.labels.numbers
        return [history_row(h, numbers[h.label], pack_moment) for h in (self.heartbeats[index] for _, index in rows)]

    # ---- the result -------------------------------------------------------------------------------------------

    def _verdicts(self, written: Set[Key]) -> list[Verdict]:
        if len(written) == len(self.heartbeats):
            verdicts = [WRITTEN] * len(self.heartbeats)
        else:
            verdicts = [DEDUPLICATED] * len(self.heartbeats)
            for rows in self.plan.rows.values():
                for key, index in rows:
                    if key in written:
                        verdicts[index] = WRITTEN
        return _merge(self.failed, verdicts) if self.failed else verdicts

    def _witness(self, written: Set[Key]) -> Heartbeat | None:
        rows = (row for rows in self.plan.rows.values() for row in rows)
        return next((self.heartbeats[index] for key, index in rows if key in written), None)

    def _count_late(self, written: Set[Key]) -> None:
        for day in self.plan.rows.keys() & self.late_days.keys():
            late = sum(key in written for key, _ in self.plan.rows[day])
            metrics.late_heartbeats.labels(reason=self.late_days[day]).inc(late)
            _log.warning("heartbeat.late", day=str(day), heartbeats=late, reason=self.late_days[day])


def _merge(failed: Sequence[Verdict | None], stored: list[Verdict]) -> list[Verdict]:
    """Return the verdicts in `failed`, with those in `stored`, in their order, in place of each None."""
    rest = iter(stored)
    return [verdict or next(rest) for verdict in failed]
