"""Compare the generator's record with the database: each acknowledged heartbeat must be stored, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import asyncpg

from bench.fleet import BUCKET_US, MICROS, Account, Device
from bench.report import ACKED, SendLog

# buckets count from 2020-01-01T00:00:00Z, in seconds
_EPOCH_S: Final = 1_577_836_800
# a device's place in the fleet, and the start of a bucket in seconds since _EPOCH_S
Key = tuple[int, int]

_ROWS: Final = """
SELECT d.device_id, h.bucket, (extract(epoch FROM h.ts) * 1000000)::bigint AS ts_us, h.clock_wrong
FROM device_heartbeats h JOIN devices d USING (device_no)
"""
_STATUS: Final = """
SELECT device_id, (extract(epoch FROM last_ts) * 1000000)::bigint AS ts_us FROM device_last_status
"""


class Line(NamedTuple):
    """One comparison. `missing` and `unexpected` must both be 0."""

    what: str
    expected: int
    found: int
    missing: int = 0
    unexpected: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """All comparisons, and the sends without a response, whose heartbeats may be stored or not."""

    lines: tuple[Line, ...]
    unanswered: int
    unanswered_found: int
    examples: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether no comparison has a missing or an unexpected row."""
        return self.missing == self.unexpected == 0

    @property
    def missing(self) -> int:
        """Return the number of missing rows over all comparisons."""
        return sum(line.missing for line in self.lines)

    @property
    def unexpected(self) -> int:
        """Return the number of unexpected rows over all comparisons."""
        return sum(line.unexpected for line in self.lines)

    def figures(self) -> dict[str, str]:
        """Return the comparisons and the first few differences as texts by name."""
        figures = {
            line.what: f"{line.found:,} of {line.expected:,}, {line.missing:,} missing, {line.unexpected:,} unexpected"
            for line in self.lines
        }
        if self.unanswered:
            figures["sends without a response"] = f"{self.unanswered:,}, of which {self.unanswered_found:,} are stored"
        return figures | {f"difference {number}": text for number, text in enumerate(self.examples, 1)}


@dataclass(slots=True)
class _Sent:
    """The generator's record, by key and by device."""

    # every ts sent in this bucket: the row may come from a send whose response was lost
    stamps: dict[Key, set[int]] = field(default_factory=dict)
    acked: set[Key] = field(default_factory=set)
    newest: dict[int, int] = field(default_factory=dict)
    unanswered: dict[int, set[int]] = field(default_factory=dict)


def key_of(device: int, ts_us: int) -> Key:
    """Return the key of a heartbeat: device and bucket."""
    return device, (ts_us - ts_us % BUCKET_US) // MICROS - _EPOCH_S


def _by_key(log: SendLog) -> _Sent:
    sent = _Sent()
    for device, ts_us, outcome in zip(log.device, log.ts_us, log.outcome, strict=True):
        key = key_of(device, ts_us)
        sent.stamps.setdefault(key, set()).add(ts_us)
        if outcome in ACKED:
            sent.acked.add(key)
            sent.newest[device] = max(ts_us, sent.newest.get(device, ts_us))
        else:
            sent.unanswered.setdefault(device, set()).add(ts_us)
    return sent


async def check(conn: asyncpg.Connection, fleet: Sequence[Account | Device], log: SendLog) -> Check:
    """Compare the database with the record `log`. The database must have been empty when the record began."""
    sent, numbers = _by_key(log), {device.device_id: number for number, device in enumerate(fleet)}
    # the first few differences, for the report
    examples: list[str] = []
    rows: Counter[Key] = Counter()
    strange = wrong_ts = clock_wrong = 0
    async with conn.transaction(readonly=True):
        async for device_id, bucket, ts_us, marked in conn.cursor(_ROWS, prefetch=10_000):
            clock_wrong += marked
            key = (numbers.get(device_id, -1), bucket)
            rows[key] += 1
            stamps = sent.stamps.get(key)
            if stamps is None:
                strange += 1
                examples.append(f"never sent: {device_id} bucket {bucket}")
            elif ts_us not in stamps or key_of(key[0], ts_us) != key:
                wrong_ts += 1
                examples.append(f"ts {ts_us} was not sent: {device_id} bucket {bucket}")
            del examples[5:]
    total, missing, unanswered = rows.total(), sorted(sent.acked - rows.keys()), sent.stamps.keys() - sent.acked
    examples += [f"acknowledged, not there: device {device}, bucket {bucket}" for device, bucket in missing[:5]]
    unexpected = strange + total - len(rows)
    lines = (
        Line("rows, one per acknowledged device and bucket", len(sent.acked), total, len(missing), unexpected),
        Line("rows with the ts of a send of their bucket", total, total - strange - wrong_ts, unexpected=wrong_ts),
        Line("rows marked as made by a wrong clock", 0, clock_wrong, unexpected=clock_wrong),
        await _status(conn, numbers, sent, examples),
    )
    return Check(lines, len(unanswered), len(unanswered & rows.keys()), tuple(examples[:15]))


async def _status(conn: asyncpg.Connection, numbers: dict[str, int], sent: _Sent, examples: list[str]) -> Line:
    """Compare device_last_status: last_ts must be the newest acknowledged ts of each device, or a later ts whose send
    got no response."""
    stored = {numbers.get(row["device_id"], -1): row["ts_us"] for row in await conn.fetch(_STATUS)}
    missing = unexpected = right = 0
    for device, newest_us in sent.newest.items():
        last_us = stored.pop(device, None)
        if last_us is None or last_us < newest_us:
            missing += 1
        elif last_us == newest_us or last_us in sent.unanswered.get(device, ()):
            right += 1
            continue
        else:
            unexpected += 1
        examples.append(f"the last status of device {device} is {last_us}, not {newest_us}")
    # the remaining rows belong to devices without an acknowledged heartbeat
    unexpected += sum(last_us not in sent.unanswered.get(device, ()) for device, last_us in stored.items())
    return Line("last status with the newest acknowledged ts", len(sent.newest), right, missing, unexpected)
