"""A day leaves the database: under load, for memory and latency; and alone, for its time beside a pipe's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import uvloop

from bench import old_days, progress, stack, yardstick
from bench.cost import Sample, forget_peak, watched
from bench.finding import Finding, of_trial, spread
from bench.fleet import Schedule, make_fleet, schedule
from bench.load import LoadRun, open_loop, target
from bench.night import Night, Window, nightly
from bench.report import Limit, Percentiles, hold, latencies_due, percentiles
from bench.scenarios import ArchiveScenario
from bench.trial import Trial, examine
from nexhb.partitions import name_of

_SEED: Final = 1
_LOOK_S: Final = 0.05
WHOLE_NIGHT: Final = "the same during the whole nightly run"
BYTES: Final = Limit("bytes of an archived heartbeat, at most 18", "", 18)
# as short as the accept window allows, so that no days lie between those that are kept and the old ones
RETENTION_DAYS: Final = 7
SETTINGS: Final = {"NEXHB_PARTITIONS__RETENTION_DAYS": f"{RETENTION_DAYS}"}


class _Loaded(NamedTuple):
    """The day that leaves under load."""

    trial: Trial
    night: Night
    archive: Window
    before: Percentiles
    during: Percentiles
    whole_night: Percentiles
    rss_before_mb: float
    rss_peak_mb: float
    # seconds of the nightly run without load, because the schedule had come to its end
    uncovered_s: float

    @property
    def growth_mb(self) -> float:
        """What the daemon's memory grew by at its highest."""
        return round(self.rss_peak_mb - self.rss_before_mb, 1)


class _Alone(NamedTuple):
    """The day that leaves while nothing else is done, and the pipe over the same day just before."""

    night: Night
    archive: Window
    piped: yardstick.Piped
    stream_sha256: str

    @property
    def ratio(self) -> float:
        """Times as long as the pipe."""
        return round(self.archive.seconds / self.piped.seconds, 2)


class _Stored(NamedTuple):
    """A day's end as the database and its manifest have it."""

    day: date
    state: str
    manifest: dict[str, Any]

    @property
    def compressed(self) -> int:
        """Bytes of all objects."""
        return sum(each["bytes"] for each in self.manifest["objects"])


def old_days_of(today: date) -> tuple[date, date]:
    """The two newest days that are older than the retention."""
    return today - timedelta(days=RETENTION_DAYS + 2), today - timedelta(days=RETENTION_DAYS + 1)


def run(scenario: ArchiveScenario) -> Finding:
    """Fill two days, archive one under load and one alone, read both back."""
    fleet = make_fleet(scenario.devices, _SEED)
    with stack.running(fleet, settings=SETTINGS) as own:
        first, second = old_days_of(datetime.now(UTC).date())
        uvloop.run(_fill(scenario, own, first, second))
        loaded = uvloop.run(_under_load(scenario, own, name_of(first)))
        alone = uvloop.run(_alone(own, second))
        stored = uvloop.run(_stored(own, (first, second)))
        read_back = own.command("archive", "verify", "--all", "--json", timeout_s=1800)
    return _finding(scenario, loaded, alone, stored, read_back)


async def _fill(scenario: ArchiveScenario, own: stack.Stack, first: date, second: date) -> None:
    conn = await own.connect()
    try:
        await old_days.make(conn, make_fleet(scenario.devices, _SEED), first, scenario.beats, _SEED)
        await old_days.make_aside(conn, first, second)
    finally:
        await conn.close(timeout=5)


# ── under load ───────────────────────────────────────────────────────────────────────────────────────────


async def _under_load(scenario: ArchiveScenario, own: stack.Stack, partition: str) -> _Loaded:
    fleet = make_fleet(scenario.devices, _SEED)
    plan = schedule(scenario.devices, scenario.interval_s, scenario.jitter_s, scenario.most_s, _SEED)
    done = asyncio.Event()
    with progress.line(len(plan), "heartbeats acknowledged, at most") as show:
        sending = asyncio.create_task(
            open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, progress=show, until=done)
        )
        try:
            async with watched(own.pid, _LOOK_S) as before:
                await asyncio.sleep(scenario.before_s)
            forget_peak(own.pid)
            async with watched(own.pid, _LOOK_S) as samples:
                night = await nightly(own)
            peak_mb = max(own.memory().peak_mb, *(each.rss_mb for each in samples))
            await asyncio.sleep(scenario.after_s)
        finally:
            done.set()
            sent = await sending
    if not night.completed:
        raise stack.StackError(f"the nightly run under load answered {night.status}: {dict(night.answer)}")
    archive = night.archive(partition)
    trial = await examine(own, fleet, sent, scenario.limits)
    return _Loaded(
        trial,
        night,
        archive,
        due_in(plan, sent, Window(sent.began_at_s, night.asked.start_s)),
        due_in(plan, sent, archive),
        due_in(plan, sent, night.asked),
        level_of(before),
        peak_mb,
        max(0.0, round(night.asked.end_s - sent.began_at_s - sent.result.duration_s, 1)),
    )


def level_of(samples: Sequence[Sample]) -> float:
    """What was resident in the last two seconds."""
    return median(each.rss_mb for each in samples[-round(2 / _LOOK_S) :])


def due_in(plan: Schedule, sent: LoadRun, window: Window) -> Percentiles:
    """Latencies of the heartbeats that were due within a window."""
    start_s, end_s = window.start_s - sent.began_at_s, window.end_s - sent.began_at_s
    return percentiles(latencies_due(plan.offset_us, sent.sends.latency_s, start_s, end_s))


# ── alone ────────────────────────────────────────────────────────────────────────────────────────────────


async def _alone(own: stack.Stack, day: date) -> _Alone:
    conn = await own.connect()
    try:
        await old_days.attach(conn, day)
        await conn.execute("CHECKPOINT")
    finally:
        await conn.close(timeout=5)
    name = name_of(day)
    # read once before, so that both read from memory
    plain = await asyncio.to_thread(yardstick.plain, own, name)
    piped = await asyncio.to_thread(yardstick.compressed, own, name)
    night = await nightly(own)
    return _Alone(night, night.archive(name), piped, plain.sha256)


async def _stored(own: stack.Stack, days: Sequence[date]) -> list[_Stored]:
    conn = await own.connect()
    try:
        found = []
        for day in days:
            row = await conn.fetchrow("SELECT * FROM hb_partitions WHERE partition_name = $1", name_of(day))
            assert row is not None  # noqa: S101 - it was archived
            manifest = await asyncio.to_thread(Path(urlsplit(row["archive_url"]).path).read_text, "utf-8")
            found.append(_Stored(day, row["state"], json.loads(manifest)))
        return found
    finally:
        await conn.close(timeout=5)


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────────


def _finding(
    scenario: ArchiveScenario, loaded: _Loaded, alone: _Alone, stored: Sequence[_Stored], read_back: dict[str, Any]
) -> Finding:
    rows = scenario.devices * scenario.beats
    under_load, by_itself = stored
    archived = sum(each.manifest["rows"] for each in stored)
    verdicts = (
        *loaded.trial.result.verdicts,
        hold(scenario.growth, loaded.growth_mb),
        hold(scenario.p99, loaded.during.p99_ms),
        hold(replace(scenario.p99, name=WHOLE_NIGHT), loaded.whole_night.p99_ms),
        hold(Limit("seconds of it without load", "", 0), loaded.uncovered_s),
        hold(scenario.ratio, alone.ratio),
        hold(BYTES, round(by_itself.compressed / rows, 2)),
        hold(Limit("rows of the two days in their archives", "", 2 * rows, "at_least"), archived),
        hold(Limit("days dropped", "", 2, "at_least"), sum(each.state == "dropped" for each in stored)),
        hold(Limit("archives damaged, read back once more", "", 0), read_back["damaged"]),
        hold(
            Limit("streams that are not what psql writes", "", 0),
            int(alone.stream_sha256 != by_itself.manifest["stream_sha256"]),
        ),
    )
    finding = of_trial(scenario.name, scenario.title, loaded.trial)
    figures = {
        "ingest before": spread(loaded.before),
        "ingest during the archive": spread(loaded.during),
        "ingest during the nightly run": spread(loaded.whole_night),
        "memory": f"{loaded.rss_before_mb:g} MB before, {loaded.rss_peak_mb:g} MB at most: {loaded.growth_mb:+g} MB",
        "under load": f"{loaded.archive.seconds:.1f} s; {loaded.night.timeline()}",
        "alone": f"{alone.archive.seconds:.1f} s; {alone.night.timeline()}",
        "the pipe": f"{alone.piped.seconds:.1f} s: {alone.piped.programs}",
        "times as long": f"{alone.ratio:g} alone, {loaded.archive.seconds / alone.piped.seconds:.2f} under load",
        "bytes per row": f"{by_itself.compressed / rows:.2f} compressed, "
        f"{by_itself.manifest['stream_bytes'] / rows:.1f} as CSV",
        "rows": finding.figures["rows"] + f"; {archived:,} archived",
    }
    details = {
        **finding.details,
        "rows_archived": archived,
        "bytes_per_row": round(by_itself.compressed / rows, 2),
        "stream_bytes_per_row": round(by_itself.manifest["stream_bytes"] / rows, 1),
        "archive_s": {"under_load": round(loaded.archive.seconds, 2), "alone": round(alone.archive.seconds, 2)},
        "pipe_s": round(alone.piped.seconds, 2),
        "pipe": alone.piped.programs,
        "nightly": {"under_load": dict(loaded.night.answer), "alone": dict(alone.night.answer)},
        "ingest": {
            "before": _shown(loaded.before),
            "during_the_archive": _shown(loaded.during),
            "during_the_nightly_run": _shown(loaded.whole_night),
        },
        "rss_mb": {"before": loaded.rss_before_mb, "peak": loaded.rss_peak_mb},
        "manifests": [under_load.manifest, by_itself.manifest],
    }
    return Finding(finding.name, finding.title, verdicts, {**finding.figures, **figures}, details)


def _shown(spread: Percentiles) -> dict[str, float | None]:
    return {"p50_ms": spread.p50_ms, "p95_ms": spread.p95_ms, "p99_ms": spread.p99_ms, "max_ms": spread.max_ms}
