"""Days of history in a database, row for row as the daemon would have written them, but without the daemon.

Bodies of the simulated fleet go through the daemon's own parser and row builder, then in by COPY.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import asyncpg

from bench.fleet import MICROS, UNITY_PACKAGE, Device, body_us
from nexhb import batch, db, wire

_RULES: Final = wire.Rules(UNITY_PACKAGE, 10, timedelta(days=7), timedelta(minutes=5))
# from the device's clock to the server's: a request's way
_ON_THE_WAY_US: Final = 40_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_ADD_LABELS: Final = """
INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid, sections)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::smallint[]) ON CONFLICT DO NOTHING
"""
_LABELS: Final = "SELECT label_no, agent_version, unity_pkg_version, network_type, ssid, sections FROM heartbeat_labels"
_FILL_STATUS: Final = """
INSERT INTO device_last_status (
    device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip, signal_dbm,
    uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, heard_at)
SELECT DISTINCT ON (device_no)
    device_no, device_id, ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip, signal_dbm,
    uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, received_at
FROM heartbeat_history ORDER BY device_no, ts DESC
"""


class Beat(NamedTuple):
    """One heartbeat to be written: whose (number in the fleet), when (µs since 1970), the how-manieth, its way."""

    device: int
    at_us: int
    number: int
    way_us: int = _ON_THE_WAY_US


def minutes_of(devices: int, beats: int, interval_s: int, end_us: int) -> Iterator[list[Beat]]:
    """One batch an interval, every device once in it, each at its own second; the last one ends at `end_us`."""
    interval_us = interval_s * MICROS
    for beat in range(beats):
        start_us = end_us - (beats - beat) * interval_us
        yield [
            # phases spread evenly, as a fleet's do; in the order in which they would arrive
            Beat(device, start_us + device * interval_us // devices, beat)
            for device in range(devices)
        ]


def lived(devices: int, beats: int, interval_s: int, start_us: int, seed: int) -> Iterator[list[Beat]]:
    """One batch an interval from `start_us` on, every device once in it, in the order of their arrival.

    Each device is up to a quarter of the interval early or late and its requests take 20 to 200 ms: what a fleet's
    history has of chance, without which it would compress to two thirds of what it does.
    """
    rng = random.Random(f"nexhb lived:{seed}")
    interval_us = interval_s * MICROS
    quarter_us = interval_us // 4
    phases = [rng.randrange(quarter_us, interval_us - quarter_us) for _ in range(devices)]
    for beat in range(beats):
        found = [
            Beat(
                device,
                start_us + beat * interval_us + phase + rng.randrange(-quarter_us, quarter_us),
                beat,
                rng.randrange(20_000, 200_000),
            )
            for device, phase in enumerate(phases)
        ]
        yield sorted(found, key=lambda each: each.at_us + each.way_us)


class Writer:
    """Turns beats into rows and copies them in."""

    def __init__(self, conn: asyncpg.Connection, fleet: Sequence[Device], numbers: dict[str, int]) -> None:
        """`numbers`: device_id → device_no."""
        self._conn = conn
        self._fleet = fleet
        self._numbers = numbers
        self._labels: dict[wire.Label, int] = {}

    @classmethod
    async def of(cls, conn: asyncpg.Connection, fleet: Sequence[Device]) -> Writer:
        """For devices that the database knows."""
        await db.use_packed(conn)
        found = await conn.fetch("SELECT device_id, device_no FROM devices")
        return cls(conn, fleet, {row["device_id"]: row["device_no"] for row in found})

    def heartbeats(self, beats: Iterable[Beat]) -> list[wire.Heartbeat]:
        """What the daemon would make of these beats' bodies."""
        found = []
        for beat in beats:
            device = self._fleet[beat.device]
            made_us = device.made_us(beat.at_us)
            found.append(
                wire.parse(
                    body_us(device, made_us, beat.number),
                    device_no=self._numbers[device.device_id],
                    device_id=device.device_id,
                    received_at=_EPOCH + timedelta(microseconds=beat.at_us + beat.way_us),
                    rules=_RULES,
                )
            )
        return found

    async def write(
        self, heartbeats: Sequence[wire.Heartbeat], table: str = "device_heartbeats", *, as_they_come: bool = False
    ) -> int:
        """Copy them in, in the order of their key, as a batch of the daemon is; how many rows. `as_they_come`: in the
        order that is given, as many small batches would lie."""
        rows = await self.rows(heartbeats, as_they_come=as_they_come)
        await self._conn.copy_records_to_table(table, records=rows, columns=batch.HISTORY_COLUMNS)
        return len(rows)

    async def rows(self, heartbeats: Sequence[wire.Heartbeat], *, as_they_come: bool = False) -> list[tuple[Any, ...]]:
        """What `write` copies."""
        await self._learn_labels(heartbeats)
        ordered = heartbeats if as_they_come else sorted(heartbeats, key=lambda h: (h.device_no, h.bucket))
        return [batch.history_row(h, self._labels[h.label]) for h in ordered]

    async def _learn_labels(self, heartbeats: Sequence[wire.Heartbeat]) -> None:
        missing = sorted({h.label for h in heartbeats} - self._labels.keys())
        if missing:
            await self._conn.execute(_ADD_LABELS, *zip(*missing, strict=True))
            self._labels = {wire.Label(*texts): number for number, *texts in await self._conn.fetch(_LABELS)}


async def fill_last_status(conn: asyncpg.Connection) -> None:
    """The newest heartbeat of each device becomes its last status."""
    await conn.execute(_FILL_STATUS)
