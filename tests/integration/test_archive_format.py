"""An archive leaves out values that follow from other values: every row is restored unchanged, from both formats."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nexhb import partitions, retirement
from nexhb.archive import catalog, export, get, restore, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.file import FolderStore
from nexhb.archive.manifest import COLUMNS, FORMAT, FORMAT_1, LAST_FORMAT, PACKED, STREAM_COLUMNS, decode
from nexhb.config import IngestSettings, Settings
from nexhb.jobs import registry
from nexhb.postgres.connections import Connection
from tests.support.nightly import NOW, OLD, House

START, END = partitions.midnight(OLD), partitions.midnight(OLD) + timedelta(days=1)
NAME = partitions.table_name(OLD)
TICK = timedelta(microseconds=1)
# Archives of the same heartbeats in each former format, by the number of the format.
FOLDER = Path(__file__).parent
ARCHIVES = {int(path.name.rpartition("_")[2]): path for path in sorted(FOLDER.glob("archive_format_*"))}

TIMES = [
    START, START + TICK, START + timedelta(seconds=1) - TICK, START + timedelta(hours=12),
    START + timedelta(seconds=9.5), END - TICK, END - timedelta(seconds=1),
]  # fmt: skip
# Times of receipt that a broken row may have: relative to ts, and absolute.
DELAYS_US = [0, 1, -1, 999_999, 1_000_000, 123_456, -123_456, 60 * 86_400_000_000, -60 * 86_400_000_000]
RECEIVED = [
    "infinity", "-infinity", "1999-12-31 23:59:59.999999+00", "2019-12-31 23:59:59.999999+00", "2020-01-01 00:00:00+00",
    "2087-12-31 23:59:59.999999+00", "2088-01-01 00:00:00+00", "9999-12-31 23:59:59.000001+00",
]  # fmt: skip
UPTIMES = [None, "0", "1", "86399", "2147483647", "-2147483648", "749407"]
BUCKETS = ["0", "1", "-1", "2147483647", "-2147483648"]
REALS = [None, "0", "-0", "0.1", "27.1", "NaN", "Infinity", "-Infinity", "16777217", "1e-45"]
SSIDS = ["", "Store-42", 'a "quoted",\nname', "\\.", "\r\n", "\u2028", " ", "NULL", '"', ",", "Café"]
IPS = [None, "10.0.0.1", "2001:db8::1", "::ffff:1.2.3.4", "fe80::1/64", "255.255.255.255"]


def any_row(chance: random.Random, labels: int) -> tuple[str | None, ...]:
    """Return a random row as texts: ts, received_at, device_no, bucket, label_no, uptime_s, ram_used_mb, temp_c,
    battery_pct, signal_dbm, plugged, unity_running, clock_wrong, ip."""
    ts = chance.choice([*TIMES, *(START + TICK * chance.randrange(86_400_000_000) for _ in TIMES)])
    ts -= timedelta(microseconds=ts.microsecond % chance.choice([1, 1, 1000, 1_000_000]))
    delay = chance.choice([*DELAYS_US, *(chance.randrange(20_000, 200_000) for _ in DELAYS_US)])
    seconds = int(ts.timestamp()) - 1_577_836_800
    usual = [str(seconds - seconds % length) for length in (10, 10, 10, 60, 1, 3600)]
    flags = [None, "t", "f"]
    return (
        ts.isoformat(),
        chance.choice(RECEIVED) if chance.random() < 0.1 else (ts + TICK * delay).isoformat(),
        str(chance.randrange(1, 60)),
        chance.choice(BUCKETS) if chance.random() < 0.1 else chance.choice(usual),
        str(chance.randrange(1, labels + 2)),  # the last label does not exist
        chance.choice([*UPTIMES, str(chance.randrange(2**31))]),
        chance.choice([None, "0", "2873", "2147483647"]),
        chance.choice(REALS),
        chance.choice([None, "0", "100"]),
        chance.choice([None, "-32768", "32767", "-60"]),
        chance.choice(flags),
        chance.choice(flags),
        chance.choice(["t", "f"]),
        chance.choice(IPS),
    )


async def fill(conn: Connection, rows: Sequence[tuple[str | None, ...]]) -> None:
    """Fill a day with these rows, of fifty known devices and some unknown ones."""
    await partitions.ensure(conn, [OLD])
    await conn.execute("INSERT INTO devices (device_id) SELECT 'kiosk-' || n FROM generate_series(1, 50) n")
    await conn.executemany(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
           VALUES ($1, '', 'wifi', $2)""",
        [("1.0.9", ssid) for ssid in SSIDS],
    )
    await conn.execute(
        f"""INSERT INTO {NAME} SELECT a::timestamptz, b::timestamptz, c::int, d::int, e::int, f::int, g::int, h::real,
            i::smallint, j::smallint, k::boolean, l::boolean, m::boolean, n::inet
            FROM unnest({", ".join(f"${n}::text[]" for n in range(1, 15))})
                 AS v (a, b, c, d, e, f, g, h, i, j, k, l, m, n)
            ON CONFLICT DO NOTHING""",
        *zip(*rows, strict=True),
    )


async def texts(conn: Connection, rows: str) -> list[list[str]]:
    """Return the rows of a query or a table as COPY writes them, in key order."""
    out = io.BytesIO()
    query = f"SELECT {', '.join(COLUMNS)} FROM {rows} r ORDER BY device_no, bucket"
    await conn.copy_from_query(query, output=out, format="csv")
    return list(csv.reader(io.StringIO(out.getvalue().decode(), newline="")))


def spelled_out() -> str:
    """Return a query for the day's plain rows, including those of unknown devices."""
    return f"({export._Q['spelled_out'].replace('$table', NAME)})"


@pytest.mark.parametrize("bucket_seconds", [10, 1, 60, 3600])
async def test_any_row_is_restored_equal_to_the_microsecond(house: House, bucket_seconds: int) -> None:
    chance = random.Random(bucket_seconds)  # noqa: S311 - it makes rows, not secrets
    await fill(house.conn, [any_row(chance, len(SSIDS)) for _ in range(4_000)])
    before = await texts(house.conn, spelled_out())
    assert len(before) > 2_000
    source = export.ArchivedTable(NAME, "day", NAME, START, END)
    stored = await export.export(house.conn, source, house.store, house.folder / "spool", bucket_seconds=bucket_seconds)
    assert (stored.manifest.format, stored.manifest.columns) == (FORMAT, PACKED)
    assert stored.manifest.bucket_seconds == bucket_seconds
    archives = [Archived(NAME, START, END, "dropped", house.store.url(stored.name), stored.sha256)]

    assert [row async for rows in verify.rows(house.store, stored.manifest) for row in rows] == before
    returned = await get.heartbeats_of(house.store, archives, "kiosk-7")
    assert [[value or "" for value in row.values()] for row in returned] == sorted(
        (row for row in before if row[0] == "kiosk-7"), key=lambda row: row[1]
    )
    assert await restore.drill(house.conn, house.store, archives[0]) == len(before)
    assert await restore.restore_into(house.conn, house.store, archives, "plain") == len(before)
    assert await texts(house.conn, "plain") == before
    await retirement.detach(house.conn, NAME)
    await house.conn.execute(f"DROP TABLE {NAME}")
    assert await restore.restore_day(house.conn, house.store, archives, NOW) == len(before)
    assert await texts(house.conn, spelled_out()) == before


async def test_an_ordinary_row_stores_nothing_that_follows_from_the_rest(house: House) -> None:
    """Leaving these columns out is what makes the archive small."""
    rows = [
        (f"{START + timedelta(seconds=60.5 * n)}", f"{START + timedelta(seconds=60.5 * n, microseconds=40_123)}", "1",
         f"{(int(START.timestamp()) + 60.5 * n - 1_577_836_800) // 10 * 10:.0f}", "2", f"{1000 + 60.5 * n // 1:.0f}",
         "900", "30.5", "80", None, "t", "t", "f", "10.0.0.1")
        for n in range(1, 3)
    ]  # fmt: skip
    await fill(house.conn, rows)
    source = export.ArchivedTable(NAME, "day", NAME, START, END)
    stored = await export.export(house.conn, source, house.store, house.folder / "spool")
    stream = b"".join([piece async for piece in verify.stream(house.store, stored.manifest)])
    booted, added = START - timedelta(seconds=1000), "," * (len(PACKED) - len(STREAM_COLUMNS["nexhb-archive-2"]))
    same = f"kiosk-1,1,1.0.9,,wifi,Store-42,10.0.0.1,f,t,{booted:%F %T}+00,,,,80"
    assert stream.decode().splitlines() == [
        ",".join(PACKED),
        f"{same},{OLD} 00:01:00.5+00,40123,900,30.5,,t{added}",
        f"{same},{OLD} 00:02:01+00,40123,900,30.5,,t{added}",
    ]


async def former(house: House, number: int) -> list[Archived]:
    """Provide a day and its supplement in a format, and a database that knows their devices."""
    for device in dict.fromkeys(row[0] for row in sorted(expected(), key=lambda row: int(row[-2]))):
        await house.conn.execute("INSERT INTO devices (device_id) VALUES ($1)", device)
    shutil.copytree(ARCHIVES[number] / NAME, house.folder / "archive" / NAME)
    url = {path.name.partition("-")[0]: path for path in (house.folder / "archive" / NAME).glob("*-manifest-*")}
    day, late = (
        (f"file://{url[kind]}", hashlib.sha256(url[kind].read_bytes()).hexdigest()) for kind in ("day", "late")
    )
    await house.conn.execute(
        """INSERT INTO hb_partitions (partition_name, range_start, range_end, state, row_count, archive_url,
                                      checksum_sha256, archived_at, dropped_at)
           VALUES ($1, $2, $3, 'dropped', 31, $4, $5, $6, $6)""",
        NAME, START, END, *day, NOW,
    )  # fmt: skip
    await house.conn.execute(
        """INSERT INTO archive_supplements (partition_name, archive_url, checksum_sha256, row_count, archive_bytes,
                                            archived_at) VALUES ($1, $2, $3, 1, 233, $4)""",
        NAME, *late, NOW,
    )  # fmt: skip
    return await catalog.find(house.conn, OLD)


def expected() -> list[list[str]]:
    """Return the rows that the former archives contain, in the order of COLUMNS; a column that was added later is
    empty."""
    with (ARCHIVES[1] / "heartbeats.csv").open(encoding="utf-8", newline="") as file:
        return [[row.get(name, "") for name in COLUMNS] for row in csv.DictReader(file)]


def streams(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the format and the SHA-256 of the stream of each archive in a folder, by kind."""
    manifests = [decode(path.read_bytes()) for path in (folder / NAME).glob("*-manifest-*")]
    return {manifest.kind: (manifest.format, manifest.stream_sha256) for manifest in manifests}


def test_there_are_archives_of_every_former_format() -> None:
    assert {f"nexhb-archive-{number}" for number in ARCHIVES} | {FORMAT} == STREAM_COLUMNS.keys()
    for number, folder in ARCHIVES.items():
        assert {format_ for format_, _ in streams(folder).values()} == {f"nexhb-archive-{number}"}


async def test_this_version_writes_the_archives_of_the_last_format(house: House) -> None:
    """If the format is new, the failure shows the command that stores its archives beside the former ones."""
    written = FolderStore(house.folder / "written", timeout_s=30)
    for kind, archived in zip(("day", "late"), await former(house, 1), strict=True):
        await restore.restore_day(house.conn, house.store, [archived], NOW)
        table = export.ArchivedTable(NAME, kind, NAME, START, END)
        await export.export(house.conn, table, written, house.folder / "spool")
        await retirement.detach(house.conn, NAME)
        await house.conn.execute(f"DROP TABLE {NAME}; UPDATE hb_partitions SET state = 'dropped'")
    stored = FOLDER / f"archive_format_{LAST_FORMAT}"
    assert stored.is_dir(), f"cp -r {house.folder / 'written'} {stored}"
    assert streams(house.folder / "written") == streams(stored)


@pytest.mark.parametrize("number", ARCHIVES)
async def test_an_archive_of_any_format_is_read_and_restored(house: House, number: int) -> None:
    archives, rows = await former(house, number), expected()
    assert len(archives) == 2
    for archived, count in zip(archives, (31, 1), strict=True):
        manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256)
        assert (manifest.format, manifest.rows) == (f"nexhb-archive-{number}", count)
        assert manifest.bucket_seconds == (None if number == 1 else 10)
        assert await restore.drill(house.conn, house.store, archived) == count
    for device in {row[0] for row in rows}:
        returned = await get.heartbeats_of(house.store, archives, device)
        assert sorted([value or "" for value in row.values()] for row in returned) == sorted(
            row for row in rows if row[0] == device
        )
    assert await restore.restore_into(house.conn, house.store, archives, "plain") == len(rows)
    assert await texts(house.conn, "plain") == rows
    assert await restore.restore_day(house.conn, house.store, archives, NOW) == len(rows)
    assert await texts(house.conn, "heartbeat_history") == rows

    await catalog.release(house.conn, OLD)
    run = await house.nightly()
    assert (run.status, run.counts["archived"], run.counts["dropped"]) == ("completed", 1, 1)
    [archived] = await catalog.find(house.conn, OLD)
    manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256)
    assert (manifest.format, manifest.rows) == (FORMAT, len(rows))
    assert await house.archived(OLD) == rows


async def test_late_heartbeats_of_a_day_in_the_first_format_are_compared_with_it_and_added(house: House) -> None:
    archives, rows = await former(house, 1), expected()
    await house.conn.execute(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
           VALUES ('1.0.9', '2.1.0', 'wifi', 'Store-42')"""
    )
    known, new = rows[0], START + timedelta(hours=7, microseconds=5)
    await house.conn.executemany(
        """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, uptime_s, reason)
           VALUES ($1, $1::timestamptz - interval '1 us', $2, $3, 1, false, 7, 'dropped')""",
        [
            (datetime.fromisoformat(known[1]), int(known[-2]), int(known[-1])),
            (new, 1, int(new.astimezone(UTC).timestamp()) - 1_577_836_800),
        ],
    )
    run = await house.nightly()
    assert (run.status, run.counts["late_archived"]) == ("completed", 1)
    assert await house.conn.fetchval("SELECT count(*) FROM late_heartbeats") == 0
    archives = await catalog.find(house.conn, OLD)
    formats = [(await verify.load(house.store, house.store.name_of(one.url), one.sha256)).format for one in archives]
    assert formats == [FORMAT_1, FORMAT_1, FORMAT]
    [returned] = [row for row in await house.archived(OLD) if row not in rows]
    assert returned[1:3] == [f"{OLD} 07:00:00.000005+00", f"{OLD} 07:00:00.000004+00"]
    assert await restore.restore_day(house.conn, house.store, archives, NOW) == len(rows) + 1


async def test_days_are_archived_with_the_configured_bucket_length(house: House) -> None:
    settings = Settings(data_dir=house.folder, ingest=IngestSettings(bucket_seconds=60))
    assert registry.nightly_context(settings).bucket_seconds == 60
    assert registry.nightly_context(Settings(data_dir=house.folder)).bucket_seconds == export.BUCKET_SECONDS
