"""Which index on device_last_status: what each costs the upsert, and what it gives the offline query."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, Final, NamedTuple

import asyncpg

from bench import history
from bench.finding import Finding
from bench.fleet import MICROS, make_fleet
from bench.micro.scratch import database, text_table
from nexhb import batch, db, sql, wire

_SEED: Final = 1
_BATCH: Final = 2_000
_INTERVAL: Final = timedelta(seconds=60)
_OFFLINE_AFTER: Final = timedelta(minutes=10)
# day[], written[], deduplicated[] of the same statement
_NO_LEDGER: Final[tuple[list[Any], ...]] = ([], [], [])
# where a heartbeat's columns lie among the upsert's arguments
_TS, _RECEIVED, _HEARD = 2, 3, 17

_FILL: Final = """
INSERT INTO {table} (device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip,
    signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong, alias, heard_at)
SELECT i.device_no, i.device_id, i.last_ts, i.last_ts, t.battery_pct, t.plugged, t.temp_c, t.network_type, t.ssid, t.ip,
    t.signal_dbm, t.uptime_s, t.ram_used_mb, t.unity_pkg_version, t.unity_running, t.agent_version, false,
    'Store ' || i.device_no / 8 || ' - kiosk ' || i.device_no % 8 + 1,
    i.last_ts
FROM unnest($1::int[], $2::text[], $3::timestamptz[]) AS i (device_no, device_id, last_ts)
JOIN device_last_status t ON t.device_no = i.device_no % {templates}
ORDER BY i.device_no
"""
_OFFLINE: Final = """
SELECT device_id, last_ts FROM {table} WHERE status = 'ok' AND heard_at < $1 ORDER BY heard_at, device_no LIMIT 10000
"""
_OFFLINE_BY_SLOT: Final = """
SELECT device_id, last_ts FROM {table}
WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int AND heard_at < $1
ORDER BY heard_at, device_no LIMIT 10000
"""
_SIZES: Final = "SELECT pg_table_size($1::text::regclass), pg_indexes_size($1::text::regclass)"
_UPDATES: Final = "SELECT n_tup_upd, n_tup_hot_upd, n_dead_tup FROM pg_stat_user_tables WHERE relname = $1"


class Design(NamedTuple):
    """The index beside the primary key; `{table}` is the table's name."""

    name: str
    ddl: str
    slot: bool = False


DESIGNS: Final = (
    Design("primary key only", ""),
    Design("btree (heard_at)", "CREATE INDEX ON {table} (heard_at)"),
    Design("BRIN (heard_at)", "CREATE INDEX ON {table} USING brin (heard_at)"),
    # the schema's own, copied with it
    Design("btree (heard_slot) + unity, as in the schema", "", slot=True),
)
OURS: Final = DESIGNS[-1]


class Scale(NamedTuple):
    """How large a fleet, how many of it silent, and how many minutes of it."""

    devices: int
    silent: int
    rounds: int


SCALES: Final = (Scale(2_000, 100, 40), Scale(1_000_000, 1_000, 10))


@dataclass(frozen=True, slots=True)
class Measured:
    """One design at one scale."""

    design: str
    upserts_per_s: float
    hot_share: float
    offline_ms: float
    offline_found: int
    table_mb: float
    index_mb: float


class Size(NamedTuple):
    """Of a table and of its indexes, MB (10^6 bytes)."""

    table_mb: float
    index_mb: float


@dataclass(frozen=True, slots=True)
class Grown:
    """What so many minutes of a fleet made of the table, updated as fast as it goes."""

    devices: int
    minutes: int
    took_s: float
    upserts_per_s: float
    hot_share: float
    dead_rows: int
    before: Size
    after: Size


class _Batch(NamedTuple):
    """Devices that report within the same moment, sorted by number, and the columns that stay."""

    numbers: list[int]
    columns: list[Sequence[Any]]


async def run(*, quick: bool) -> list[Finding]:
    """Every design at every scale; the large one takes minutes."""
    return [await _scale(scale) for scale in SCALES[: 1 if quick else None]]


class _Run(NamedTuple):
    """One design at one scale, in a table of its own."""

    conn: asyncpg.Connection
    table: str
    design: Design
    scale: Scale
    start: datetime


async def _scale(scale: Scale) -> Finding:
    start = datetime.now(UTC).replace(microsecond=0)
    async with database() as conn:
        templates = await _templates(conn, min(scale.devices, _BATCH))
        ids = _device_ids(scale.devices)
        silent = set(random.Random(_SEED).sample(range(scale.devices), scale.silent))
        batches = list(_batches(scale, ids, silent, templates))
        found = []
        for number, design in enumerate(DESIGNS):
            run_of = _Run(conn, f"status_{number}", design, scale, start)
            await _make(run_of)
            await _fill(run_of, ids, silent)
            found.append(await _measure(run_of, batches))
            await conn.execute(f"DROP TABLE {run_of.table}")
    return _finding(scale, found)


async def grown(conn: asyncpg.Connection, scale: Scale) -> Grown:
    """The schema's own design after a fleet's minutes, by the writer's statement in batches. The table is dropped."""
    templates = await _templates(conn, min(scale.devices, _BATCH))
    ids = _device_ids(scale.devices)
    silent = set(random.Random(_SEED).sample(range(scale.devices), scale.silent))
    run_of = _Run(conn, f"status_grown_{scale.devices}", OURS, scale, datetime.now(UTC).replace(microsecond=0))
    await _make(run_of)
    await _fill(run_of, ids, silent)
    before = await _size(run_of)
    took_s, upserts = await _upsert(run_of, list(_batches(scale, ids, silent, templates)))
    await conn.execute("SELECT pg_stat_force_next_flush()")
    ((updates, hot, dead),) = await conn.fetch(_UPDATES, run_of.table)
    after = await _size(run_of)
    await conn.execute(f"DROP TABLE {run_of.table}")
    return Grown(
        scale.devices,
        scale.rounds,
        round(took_s, 1),
        round(upserts / took_s),
        round(hot / updates, 4),
        dead,
        before,
        after,
    )


async def _size(of: _Run) -> Size:
    ((table, index),) = await of.conn.fetch(_SIZES, of.table)
    return Size(table / 1e6, index / 1e6)


def _finding(scale: Scale, found: Sequence[Measured]) -> Finding:
    table = text_table(
        ("index", "upserts/s", "HOT", "offline query", "table", "indexes"),
        [
            (
                each.design,
                f"{each.upserts_per_s:,.0f}",
                f"{each.hot_share:.0%}",
                f"{each.offline_ms:.2f} ms",
                f"{each.table_mb:.1f} MB",
                f"{each.index_mb:.1f} MB",
            )
            for each in found
        ],
    )
    title = (
        f"device_last_status, {scale.devices:,} devices, {scale.silent:,} of them silent, "
        f"after {scale.rounds} minutes of upserts in batches of {_BATCH:,}"
    )
    details = {"devices": scale.devices, "designs": [asdict(each) for each in found]}
    return Finding(f"micro-status-{scale.devices}", title, (), {"table": table}, details)


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────


async def _templates(conn: asyncpg.Connection, number: int) -> list[wire.Heartbeat]:
    """Heartbeats of as many varied devices, and their rows in device_last_status under the numbers from 0."""
    fleet = make_fleet(number, _SEED)
    numbers = {device.device_id: index for index, device in enumerate(fleet)}
    writer = history.Writer(conn, fleet, numbers)
    now_us = time.time_ns() // 1000
    heartbeats = writer.heartbeats(history.Beat(index, now_us - MICROS, index) for index in range(number))
    await db.use_packed(conn)
    await conn.fetchrow(sql.queries("writer")["upsert_last_status"], *batch.status_columns(heartbeats), *_NO_LEDGER)
    return heartbeats


def _device_ids(devices: int) -> list[str]:
    rng = random.Random(_SEED)
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(devices)]


async def _make(of: _Run) -> None:
    """The schema's own table, its storage parameters too; without the slot where the design has none."""
    options = await of.conn.fetchval("SELECT reloptions FROM pg_class WHERE oid = 'device_last_status'::regclass")
    including = "INCLUDING ALL" if of.design.slot else "INCLUDING DEFAULTS INCLUDING CONSTRAINTS"
    await of.conn.execute(f"CREATE TABLE {of.table} (LIKE device_last_status {including}) WITH ({', '.join(options)})")
    if not of.design.slot:
        await of.conn.execute(f"ALTER TABLE {of.table} DROP COLUMN heard_slot, ADD PRIMARY KEY (device_no)")
    if of.design.ddl:
        await of.conn.execute(of.design.ddl.format(table=of.table))


async def _fill(of: _Run, ids: list[str], silent: set[int]) -> None:
    """Every device heard of: the silent ones an hour ago, the others within the last minute."""
    statement = _FILL.format(table=of.table, templates=min(len(ids), _BATCH))
    hour_ago, rng = of.start - timedelta(hours=1), random.Random(_SEED)
    for chunk in _chunks(len(ids)):
        stamps = [hour_ago if number in silent else of.start - timedelta(seconds=rng.random() * 60) for number in chunk]
        await of.conn.execute(statement, list(chunk), [ids[number] for number in chunk], stamps)
    await of.conn.execute(f"VACUUM (ANALYZE) {of.table}")


def _chunks(number: int, most: int = 100_000) -> Iterator[range]:
    return (range(first, min(first + most, number)) for first in range(0, number, most))


def _batches(scale: Scale, ids: list[str], silent: set[int], templates: list[wire.Heartbeat]) -> Iterator[_Batch]:
    """The devices that report, by the second of the minute in which they do: anywhere in the table, as phases are."""
    order = [number for number in range(scale.devices) if number not in silent]
    random.Random(_SEED).shuffle(order)
    for first in range(0, len(order), _BATCH):
        numbers = sorted(order[first : first + _BATCH])
        columns = list(batch.status_columns([templates[number % len(templates)] for number in numbers]))
        columns[0], columns[1] = numbers, [ids[number] for number in numbers]
        yield _Batch(numbers, columns)


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────


async def _measure(of: _Run, batches: Sequence[_Batch]) -> Measured:
    took_s, upserts = await _upsert(of, batches)
    await of.conn.execute("SELECT pg_stat_force_next_flush()")
    updates = await of.conn.fetchrow(_UPDATES, of.table)
    sizes = await of.conn.fetchrow(_SIZES, of.table)
    assert updates is not None  # noqa: S101 - the table is there
    assert sizes is not None  # noqa: S101 - a SELECT without FROM has one row
    # as autovacuum would have done by then: the planner must know of what it plans
    await of.conn.execute(f"ANALYZE {of.table}")
    await _until_no_vacuum(of.conn)
    offline_ms, found = await _offline(of)
    return Measured(
        design=of.design.name,
        upserts_per_s=upserts / took_s,
        hot_share=updates["n_tup_hot_upd"] / updates["n_tup_upd"],
        offline_ms=offline_ms,
        offline_found=found,
        table_mb=sizes[0] / 1e6,
        index_mb=sizes[1] / 1e6,
    )


async def _upsert(of: _Run, batches: Sequence[_Batch]) -> tuple[float, int]:
    """A heartbeat of every device that reports, every minute; seconds in the statement, and how many."""
    statement = sql.queries("writer")["upsert_last_status"].replace("device_last_status", of.table)
    prepared = await of.conn.prepare(statement)
    took_s, upserts = 0.0, 0
    for minute in range(of.scale.rounds):
        for at, each in enumerate(batches):
            stamp = of.start + (minute + at / len(batches)) * _INTERVAL + timedelta(milliseconds=1)
            columns = list(each.columns)
            columns[_TS] = columns[_RECEIVED] = columns[_HEARD] = [stamp] * len(each.numbers)
            began = time.perf_counter()
            row = await prepared.fetchrow(*columns, *_NO_LEDGER)
            took_s += time.perf_counter() - began
            if row is None or row["written"] != len(each.numbers):
                raise RuntimeError(f"{row} were written, not {len(each.numbers)}")
            upserts += len(each.numbers)
    return took_s, upserts


async def _until_no_vacuum(conn: asyncpg.Connection) -> None:
    """Autovacuum takes half of a scan's time when it happens to be at work."""
    for _ in range(600):
        if not await conn.fetchval("SELECT count(*) FROM pg_stat_progress_vacuum"):
            return
        await asyncio.sleep(0.2)


async def _offline(of: _Run) -> tuple[float, int]:
    query = (_OFFLINE_BY_SLOT if of.design.slot else _OFFLINE).format(table=of.table)
    cutoff = of.start + of.scale.rounds * _INTERVAL - _OFFLINE_AFTER
    prepared, took = await of.conn.prepare(query), []
    for _ in range(20):
        began = time.perf_counter()
        found = await prepared.fetch(cutoff)
        took.append(time.perf_counter() - began)
    if len(found) != of.scale.silent:
        raise RuntimeError(f"{len(found)} devices are offline, not {of.scale.silent}")
    return median(took) * 1e3, len(found)
