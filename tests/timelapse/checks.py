"""The checks after the last night."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from nexhb import partitions
from nexhb.archive import catalog, verify
from nexhb.archive.catalog import Archived
from nexhb.audit import audit
from nexhb.errors import NexhbError
from tests.timelapse.ledger import Key, Row, key_of, row_of_record, row_of_texts
from tests.timelapse.world import DAYS_AHEAD, START, World


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    what: str
    figures: str
    wrong: list[str]  # examples of what is wrong


async def checks(world: World) -> list[Check]:
    """Return the results of all checks."""
    await world.ingest.send_all()
    archives = await catalog.current_archives(world.conn)
    return [
        await _partitions(world),
        await _leftovers(world),
        await _verified(world, archives),
        await _older_days(world),
        await _every_heartbeat(world, archives),
        await _last_status(world),
        await _runs(world),
        await _audit(world),
    ]


async def _partitions(world: World) -> Check:
    today, settings = world.settings.end.date(), world.settings
    expected = partitions.days_between(
        today - timedelta(days=settings.retention_days), today + timedelta(days=DAYS_AHEAD)
    )
    attached = {p.start.date(): p for p in await partitions.attached(world.conn)}
    rows = await world.conn.fetch("SELECT range_start::date AS day, state FROM hb_partitions")
    states = {row["day"]: row["state"] for row in rows}
    wrong = [f"{day} is missing" for day in expected if day not in attached]
    wrong += [f"{day} is still attached" for day in attached if day not in expected]
    wrong += [
        f"{day} is attached, but its state is {states.get(day)}" for day in attached if states.get(day) != "active"
    ]
    return Check("exactly the days within the retention are attached", f"{len(attached)} partitions", wrong)


async def _leftovers(world: World) -> Check:
    conn = world.conn
    pending = await conn.fetch("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhdetachpending")
    loose = await conn.fetch(
        """SELECT relname FROM pg_class WHERE relname ~ '^device_heartbeats_\\d+$' AND relkind = 'r'
           AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = pg_class.oid)"""
    )
    late = await conn.fetch("SELECT device_no, bucket, reason FROM late_heartbeats")
    spooled = list(world.spool.glob("*"))
    wrong = [f"pending: {row[0]}" for row in pending] + [f"detached: {row[0]}" for row in loose]
    wrong += [f"late: {dict(row)}" for row in late] + [f"spooled: {path.name}" for path in spooled]
    return Check(
        "no detach pending, no day detached, no late heartbeat, no file in the spool", f"{len(wrong)} left", wrong
    )


async def _verified(world: World, archives: list[Archived]) -> Check:
    wrong = []
    for archived in archives:
        try:
            await verify.verify(world.store, world.store.name_of(archived.url), archived.sha256)
        except NexhbError as error:
            wrong.append(f"{archived.partition}, supplement {archived.supplement_no}: {error}")
    late = sum(archived.supplement_no > 0 for archived in archives)
    return Check("every archive verified", f"{len(archives) - late} days, {late} supplements", wrong)


async def _older_days(world: World) -> Check:
    first = world.settings.end.date() - timedelta(days=world.settings.retention_days)
    rows = await world.conn.fetch("SELECT range_start::date AS day, state, archive_url, reason FROM hb_partitions")
    states = {row["day"]: row for row in rows if row["day"] < first}
    wrong = [
        f"{day}: {dict(row)}" for day, row in states.items() if row["state"] != "dropped" or not row["archive_url"]
    ]
    older = partitions.days_between(START.date(), first - timedelta(days=1))
    wrong += [f"{day} never had a partition" for day in older if day not in states]
    return Check("every older day is only in the archive", f"{len(states)} days", wrong)


async def _every_heartbeat(world: World, archives: list[Archived]) -> Check:
    kept = [row_of_record(record) for record in await world.conn.fetch("SELECT * FROM heartbeat_history")]
    attached = {p.name for p in await partitions.attached(world.conn)}
    stored: list[Row] = []
    for archived in archives:
        if archived.partition not in attached:  # if the day is attached, it was restored, and its rows count instead
            manifest = await verify.load(world.store, world.store.name_of(archived.url), archived.sha256)
            async for rows in verify.rows(world.store, manifest):
                stored += [row_of_texts(texts) for texts in rows]
    sent = world.ledger.rows
    times = Counter(key_of(row) for rows in (kept, stored) for row in rows)
    both = {key_of(row) for row in kept} & {key_of(row) for row in stored}
    wrong = _examples("missing", (key for key in sent if key not in times))
    wrong += _examples("never acknowledged", (key for key in times if key not in sent))
    wrong += _examples("in a partition and in an archive", both)
    wrong += _examples("twice", (key for key, n in times.items() if n > 1 and key not in both))
    others = [row for rows in (kept, stored) for row in rows if row not in sent.get(key_of(row), [row])]
    wrong += _examples("with other values than were sent", map(key_of, others))
    wrong += [f"stored {row}, sent {sent[key_of(row)]}" for row in others[:1]]
    figures = f"{len(sent):,} acknowledged = {len(kept):,} in partitions + {len(stored):,} in archives"
    return Check("every heartbeat is stored once, with the values that were sent", figures, wrong)


def _examples(what: str, keys: Iterable[Key]) -> list[str]:
    affected = sorted(keys)
    return [f"{len(affected)} {what}, the first is {affected[0]}"] if affected else []


_STATUS = "SELECT *, last_ts AS ts, 0 AS bucket FROM device_last_status"


async def _last_status(world: World) -> Check:
    statuses = {record["device_no"]: record for record in await world.conn.fetch(_STATUS)}
    since = world.settings.end - timedelta(days=world.settings.retention_days)
    wrong = [f"device {number} never sent a heartbeat" for number in statuses if number not in world.ledger.newest]
    for number, newest in world.ledger.newest.items():
        record = statuses.get(number)
        if record is None or row_of_record(record)[:-1] not in [row[:-1] for row in world.ledger.statuses(number)]:
            wrong.append(f"{newest.device_id}: {record and dict(record)}, newest is {newest}")
        elif record["status"] not in _statuses(world.ledger.last_received[number], since, world.inactive_before):
            wrong.append(
                f"{newest.device_id} is {record['status']}, last received {world.ledger.last_received[number]}"
            )
    inactive = sum(record["status"] == "inactive" for record in statuses.values())
    return Check("the last status is the newest heartbeat", f"{len(statuses)} devices, {inactive} inactive", wrong)


def _statuses(ts: datetime, since: datetime, inactive_before: datetime) -> tuple[str, ...]:
    """Return the allowed statuses of a device that sent its last heartbeat at `ts`: the device is inactive according to
    the retention of the last night, or may be according to a shorter retention of an earlier night."""
    return ("inactive",) if ts < since else ("ok", "inactive") if ts < inactive_before else ("ok",)


async def _runs(world: World) -> Check:
    rows = await world.conn.fetch(
        "SELECT job, status, ended_at IS NULL AS open, count(*) FROM job_runs GROUP BY 1, 2, 3"
    )
    wrong = [str(dict(row)) for row in rows if row["open"] or row["status"] == "running"]
    totals = Counter[str]()
    for row in rows:
        totals[f"{row['job']} {row['status']}"] += row["count"]
    return Check(
        "every run of a job has ended", ", ".join(f"{n:,} {what}" for what, n in sorted(totals.items())), wrong
    )


async def _audit(world: World) -> Check:
    """Check the result of `nexhb audit` for each day."""
    rows = await world.conn.fetch("SELECT range_start::date AS day FROM hb_partitions ORDER BY 1")
    audits = [await audit(world.conn, row["day"]) for row in rows]
    wrong = [str(result.as_dict()) for result in audits if result.missing]
    written, acknowledged = (
        sum(result.written for result in audits),
        sum(len(rows) for rows in world.ledger.rows.values()),
    )
    if not len(world.ledger.rows) <= written <= acknowledged:
        wrong.append(f"{written} written, {len(world.ledger.rows)} to {acknowledged} acknowledged")
    return Check("nexhb audit has no difference on any day", f"{len(audits)} days, {written:,} written", wrong)
