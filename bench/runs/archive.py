"""A nightly run archives, verifies and drops a day under a fleet's load."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

import asyncpg
import uvloop

from bench import stack
from bench.cost import forget_peak
from bench.finding import Finding, spread
from bench.fleet import make_fleet, schedule
from bench.report import ALL_ACKNOWLEDGED, at_least, at_most, percentiles
from bench.runs import Plan, Say
from bench.trial import SEED, examine, send
from nexhb import partitions

# the shortest retention that the accept window allows, so that no days lie between the kept days and the old day
RETENTION_DAYS: Final = 7
_NIGHTLY_S: Final = 1800.0
_ADD_LABELS: Final = """
INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid, sections)
SELECT DISTINCT '1.0.9', '2.1.0', 'wifi', 'Store-' || device_no / 8, 31 FROM devices
"""
# $1: the start of the day, $2: heartbeats of each device, $3: seconds between them. The rows are in the order of
# arrival and not in that of the key, each device up to a quarter of the interval early or late, with microseconds, and
# with values as various as those of bench/fleet.py: if the values varied less, the archive would have only two thirds
# of the size of a real day's archive.
_FILL: Final = """
INSERT INTO {table} (ts, received_at, device_no, bucket, label_no, uptime_s, ram_used_mb, temp_c, battery_pct, plugged,
    unity_running, clock_wrong, ip)
SELECT ts, ts + (0.02 + 0.18 * random()) * interval '1 s' AS arrival, device_no,
       (floor(extract(epoch FROM ts) / 10) * 10)::bigint - 1577836800, label_no, device_no * 997 + beat * $3::int,
       2848 * (45 + floor(random() * 37)) / 100, 26.8 + floor(random() * 64) / 10,
       CASE WHEN wave < 80 THEN 100 - wave ELSE wave - 60 END, wave >= 80, random() < 0.9, false,
       '192.168.0.0'::inet + device_no % 65536
FROM (SELECT device_no, label_no, 0.25 + 0.5 * random() AS phase
      FROM devices JOIN heartbeat_labels ON ssid = 'Store-' || device_no / 8) AS fleet,
     generate_series(0, $2::int - 1) AS beat,
     LATERAL (SELECT $1::timestamptz + (beat + phase + (random() - 0.5) / 2) * $3 * interval '1 s' AS at) AS due,
     -- a fifth of the clocks have milliseconds only, and two fifths of the devices are always on mains
     LATERAL (SELECT date_trunc(CASE WHEN device_no % 5 = 0 THEN 'milliseconds' ELSE 'microseconds' END, at) AS ts,
                     CASE WHEN device_no % 5 < 2 THEN 160 ELSE (beat / 2 + device_no) % 160 END AS wave) AS now
ORDER BY arrival
"""


async def make_day(conn: asyncpg.Connection, day: date, beats: int) -> None:
    """Create the partition of a day, with `beats` heartbeats of each device, and finish it as the nightly run does once
    the day accepts no more heartbeats."""
    table = (await partitions.ensure(conn, [day]))[day]
    await conn.execute(_ADD_LABELS)
    await conn.execute(_FILL.format(table=table), partitions.midnight(day), beats, 86_400 // beats)
    await conn.execute(f"VACUUM (FREEZE, ANALYZE) {table}")
    await conn.execute("CHECKPOINT")


@dataclass(frozen=True)
class Archive(Plan):
    """An old day archived under load."""

    QUICK: ClassVar = {"beats": 144, "before_s": 10.0}

    name: str = "archive"
    title: str = "a day of 2,000 devices archived, verified and dropped, under the load of scenario 2"
    # number of devices in the old day, and in the load
    devices: int = 2000
    # heartbeats per device in the old day
    beats: int = 1440
    interval_s: float = 60
    jitter_s: float = 15
    before_s: float = 30
    max_s: float = 900
    growth_mb: float = 64
    p99_ms: float = 50
    bytes_per_row: float = 18

    def run(self, say: Say) -> Finding:
        """Fill a day, archive it under load, read the archive back; return the finding."""
        settings = {"NEXHB_PARTITIONS__RETENTION_DAYS": f"{RETENTION_DAYS}"}
        with stack.running(make_fleet(self.devices, SEED), settings=settings) as own:
            return uvloop.run(self._run(own))

    async def _run(self, own: stack.Stack) -> Finding:
        fleet, day = make_fleet(self.devices, SEED), datetime.now(UTC).date() - timedelta(days=RETENTION_DAYS + 1)
        async with own.connected() as conn:
            await make_day(conn, day, self.beats)
        plan = schedule(self.devices, self.interval_s, self.jitter_s, self.max_s, SEED)
        done = asyncio.Event()
        sending = asyncio.create_task(send(own, fleet, plan, until=done))
        try:
            await asyncio.sleep(self.before_s)
            before_mb = own.memory().rss_mb
            forget_peak(own.pid)
            start_s = time.time()
            status, answer = await asyncio.to_thread(own.post, "/ops/nightly", timeout_s=_NIGHTLY_S)
            end_s, peak_mb = time.time(), own.memory().peak_mb
        finally:
            done.set()
            sent = await sending
        if answer.get("status") != "completed":
            raise stack.StackError(f"the nightly run returned {status}: {answer}")
        trial = await examine(own, fleet, sent, ALL_ACKNOWLEDGED)
        async with own.connected() as conn:
            query = "SELECT state, archive_url FROM hb_partitions WHERE partition_name = $1"
            ((state, url),) = await conn.fetch(query, partitions.table_name(day))
        manifest = json.loads(await asyncio.to_thread(Path(urlsplit(url).path).read_text, "utf-8"))
        verified = own.command("archive", "verify", "--all", "--json", timeout_s=_NIGHTLY_S)
        rows, bytes_each = manifest["rows"], sum(each["bytes"] for each in manifest["objects"]) / manifest["rows"]
        start_s, end_s = start_s - sent.began_at_s, end_s - sent.began_at_s
        during = percentiles(sent.sends.due_in(start_s, end_s).latencies())
        growth_mb = round(peak_mb - before_mb, 1)
        verdicts = (
            at_most("growth of the daemon's memory, below 64 MB", self.growth_mb, growth_mb),
            at_most("p99 of ingest during the nightly run, below 50 ms", self.p99_ms, during.p99_ms),
            at_most("bytes of an archived heartbeat, at most 18", self.bytes_per_row, round(bytes_each, 2)),
            at_least("rows of the day in its archive", self.devices * self.beats, rows),
            at_least("days dropped", 1, int(state == "dropped")),
            at_most("archives damaged, read back once more", 0, verified["damaged"]),
        )
        figures = {
            "ingest during the nightly run": spread(during),
            "nightly run": f"{end_s - start_s:.1f} s: archived, verified, dropped, drilled",
            "memory": f"{before_mb:g} MB before, {peak_mb:g} MB at most: {growth_mb:+g} MB",
            "bytes per row": f"{bytes_each:.2f} compressed, {manifest['stream_bytes'] / rows:.1f} as CSV",
        }
        return trial.finding(self.name, self.title, *verdicts, figures=figures)
