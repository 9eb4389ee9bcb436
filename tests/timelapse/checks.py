"""What must hold when the last night is over."""

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
from tests.timelapse.ledger import Key, Row, key_of, row_of, row_of_record, row_of_texts
from tests.timelapse.world import DAYS_AHEAD, START, World


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    figures: str
    wrong: list[str]  # some of what is


async def checks(world: World) -> list[Check]:
    """All of them."""
    await world.ingest.send_all()
    archives = await catalog.every(world.conn)
    return [
        await _partitions(world),
        await _leftovers(world),
        await _verified(world, archives),
        await _older_days(world),
        await _every_heartbeat(world, archives),
        await _last_status(world),
        await _runs(world),
        await _own_ledger(world),
    ]


async def _partitions(world: World) -> Check:
    today, settings = world.settings.end.date(), world.settings
    wanted = partitions.days_between(
        today - timedelta(days=settings.retention_days), today + timedelta(days=DAYS_AHEAD)
    )
    found = {p.start.date(): p for p in await partitions.attached(world.conn)}
    rows = await world.conn.fetch("SELECT range_start::date AS day, state FROM hb_partitions")
    states = {row["day"]: row["state"] for row in rows}
    wrong = [f"{day} is missing" for day in wanted if day not in found]
    wrong += [f"{day} is still there" for day in found if day not in wanted]
    wrong += [f"{day} is attached, and {states.get(day)}" for day in found if states.get(day) != "active"]
    return Check("exactly the days to be kept are attached", f"{len(found)} partitions", wrong)


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
    return Check("nothing pending, detached, late or spooled", f"{len(wrong)} left", wrong)


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
    wrong += [f"{day} was never there" for day in older if day not in states]
    return Check("every older day is in the archive only", f"{len(states)} days", wrong)


async def _every_heartbeat(world: World, archives: list[Archived]) -> Check:
    kept = [row_of_record(record) for record in await world.conn.fetch("SELECT * FROM heartbeat_history")]
    attached = {p.name for p in await partitions.attached(world.conn)}
    stored: list[Row] = []
    for archived in archives:
        if archived.partition not in attached:  # one that is attached came back: its archive is of the past
            manifest = await verify.load(world.store, world.store.name_of(archived.url), archived.sha256)
            async for rows in verify.rows(world.store, manifest):
                stored += [row_of_texts(texts) for texts in rows]
    sent = world.ledger.rows
    times = Counter(key_of(row) for rows in (kept, stored) for row in rows)
    both = {key_of(row) for row in kept} & {key_of(row) for row in stored}
    wrong = _some("missing", (key for key in sent if key not in times))
    wrong += _some("never acknowledged", (key for key in times if key not in sent))
    wrong += _some("in a partition and in an archive", both)
    wrong += _some("twice", (key for key, n in times.items() if n > 1 and key not in both))
    others = [row for rows in (kept, stored) for row in rows if row not in sent.get(key_of(row), [row])]
    wrong += _some("with other values than were sent", map(key_of, others))
    wrong += [f"found {row}, sent {sent[key_of(row)]}" for row in others[:1]]
    figures = f"{len(sent):,} acknowledged = {len(kept):,} in partitions + {len(stored):,} in archives"
    return Check("every heartbeat once, with every value", figures, wrong)


def _some(what: str, keys: Iterable[Key]) -> list[str]:
    found = sorted(keys)
    return [f"{len(found)} {what}, {found[0]} first"] if found else []


_STATUS = """
    SELECT device_id, last_ts AS ts, received_at, clock_wrong, battery_pct, plugged, temp_c, network_type, ssid, ip,
           signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, device_no,
           0 AS bucket, status
    FROM device_last_status"""


async def _last_status(world: World) -> Check:
    found = {record["device_no"]: record for record in await world.conn.fetch(_STATUS)}
    since = world.settings.end - timedelta(days=world.settings.retention_days)
    wrong = [f"{number} is not known" for number in found if number not in world.ledger.newest]
    for number, newest in world.ledger.newest.items():
        record = found.get(number)
        if record is None or row_of_record(record)[:-1] != row_of(newest)[:-1]:
            wrong.append(f"{newest.device_id}: {record and dict(record)}, newest is {newest}")
        elif record["status"] not in _statuses(world.ledger.heard[number], since, world.inactive_before):
            wrong.append(f"{newest.device_id} is {record['status']}, last heard {world.ledger.heard[number]}")
    inactive = sum(record["status"] == "inactive" for record in found.values())
    return Check("the last status is the newest heartbeat", f"{len(found)} devices, {inactive} inactive", wrong)


def _statuses(ts: datetime, since: datetime, ever: datetime) -> tuple[str, ...]:
    """By the last night's retention, or by that of some night with a shorter one."""
    return ("inactive",) if ts < since else ("ok", "inactive") if ts < ever else ("ok",)


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


async def _own_ledger(world: World) -> Check:
    """What `nexhb audit` says of each day."""
    rows = await world.conn.fetch("SELECT range_start::date AS day FROM hb_partitions ORDER BY 1")
    audits = [await audit(world.conn, row["day"]) for row in rows]
    wrong = [str(found.shown()) for found in audits if found.missing]
    written, again = sum(found.written for found in audits), sum(len(rows) for rows in world.ledger.rows.values())
    if not len(world.ledger.rows) <= written <= again:
        wrong.append(f"{written} written, {len(world.ledger.rows)} to {again} were acknowledged")
    return Check("nexhb audit agrees, day by day", f"{len(audits)} days, {written:,} written", wrong)
