"""What the generator recorded against what the database holds: every acknowledged heartbeat, and nothing besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Protocol

import asyncpg
from rich.table import Table

from bench.fleet import BUCKET_US, MICROS
from bench.report import Outcome, SendLog

# buckets count from 2020-01-01T00:00:00Z, in seconds
_EPOCH_S: Final = 1_577_836_800
_PREFETCH: Final = 10_000
_ACKED: Final = (Outcome.WRITTEN, Outcome.DEDUPLICATED)


class Named(Protocol):
    """Whatever has a device's id."""

    @property
    def device_id(self) -> str:
        """The id."""


# a device's number in the fleet, and the start of a bucket in seconds since _EPOCH_S
Key = tuple[int, int]

_ROWS: Final = """
SELECT d.device_id, h.bucket, (extract(epoch FROM h.ts) * 1000000)::bigint AS ts_us, h.clock_wrong
FROM device_heartbeats h JOIN devices d USING (device_no)
"""
_STATUS: Final = """
SELECT device_id, (extract(epoch FROM last_ts) * 1000000)::bigint AS ts_us FROM device_last_status
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison. `missing` and `unexpected` must both be 0."""

    what: str
    expected: int
    found: int
    missing: int = 0
    unexpected: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is missing and nothing is there that should not be."""
        return self.missing == 0 and self.unexpected == 0


@dataclass(frozen=True, slots=True)
class Check:
    """All comparisons, and what no comparison can decide: sends that were never answered."""

    lines: tuple[Line, ...]
    unanswered: int
    unanswered_found: int
    examples: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every comparison came out."""
        return all(line.ok for line in self.lines)

    @property
    def missing(self) -> int:
        """What is not there, over all comparisons."""
        return sum(line.missing for line in self.lines)

    @property
    def unexpected(self) -> int:
        """What is there and should not be, over all comparisons."""
        return sum(line.unexpected for line in self.lines)

    def to_json(self) -> dict[str, object]:
        """All of it, for a file."""
        return {"ok": self.ok, **asdict(self)}

    def table(self) -> Table:
        """All of it, for a person."""
        out = Table(title=f"the database against the record: {'ok' if self.ok else 'NOT ok'}", title_justify="left")
        for name in ("what", "expected", "found", "missing", "unexpected"):
            out.add_column(name, justify="left" if name == "what" else "right")
        out.add_column("")
        for line in self.lines:
            numbers = (f"{n:,}" for n in (line.expected, line.found, line.missing, line.unexpected))
            out.add_row(line.what, *numbers, "[green]ok[/]" if line.ok else "[red]wrong[/]")
        if self.unanswered:
            out.add_row(
                "sent, not acknowledged: may be in or not", f"{self.unanswered:,}", f"{self.unanswered_found:,}"
            )
        for example in self.examples:
            out.caption = f"{out.caption or ''}{example}\n"
        return out


@dataclass(slots=True)
class _Sent:
    """The record, turned round: by key and by device."""

    # every ts sent in this bucket: the row may be that of a send whose answer was lost
    stamps: dict[Key, set[int]] = field(default_factory=dict)
    acked: set[Key] = field(default_factory=set)
    newest: dict[int, int] = field(default_factory=dict)
    unanswered: dict[int, set[int]] = field(default_factory=dict)


def key_of(device: int, ts_us: int) -> Key:
    """The key of a heartbeat."""
    return device, (ts_us - ts_us % BUCKET_US) // MICROS - _EPOCH_S


def _turned(log: SendLog) -> _Sent:
    sent = _Sent()
    for device, ts_us, outcome in zip(log.device, log.ts_us, log.outcome, strict=True):
        key = key_of(device, ts_us)
        sent.stamps.setdefault(key, set()).add(ts_us)
        if outcome in _ACKED:
            sent.acked.add(key)
            sent.newest[device] = max(ts_us, sent.newest.get(device, ts_us))
        else:
            sent.unanswered.setdefault(device, set()).add(ts_us)
    return sent


class _Examples:
    """The first few differences, for the person who has to find out."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        if len(self.lines) < 10:
            self.lines.append(text)


async def check(conn: asyncpg.Connection, fleet: Sequence[Named], log: SendLog) -> Check:
    """Compare. The database must hold nothing from before the record began."""
    sent, examples = _turned(log), _Examples()
    numbers = {device.device_id: number for number, device in enumerate(fleet)}
    rows = await _history(conn, numbers, sent, examples)
    status = await _status(conn, numbers, sent, examples)
    unanswered = sent.stamps.keys() - sent.acked
    return Check(
        lines=(*rows.lines, status),
        unanswered=len(unanswered),
        unanswered_found=rows.unanswered_found,
        examples=tuple(examples.lines),
    )


@dataclass(frozen=True, slots=True)
class _History:
    lines: tuple[Line, ...]
    unanswered_found: int


async def _history(conn: asyncpg.Connection, numbers: dict[str, int], sent: _Sent, examples: _Examples) -> _History:
    """device_heartbeats: a row per acknowledged key, one each, with the ts of a send of that bucket."""
    found: Counter[Key] = Counter()
    total = strange = wrong_ts = clock_wrong = 0
    async with conn.transaction(readonly=True):
        async for device_id, bucket, ts_us, marked in conn.cursor(_ROWS, prefetch=_PREFETCH):
            total += 1
            clock_wrong += marked
            key = (numbers.get(device_id, -1), bucket)
            found[key] += 1
            stamps = sent.stamps.get(key)
            if stamps is None:
                strange += 1
                examples.note(f"nobody sent: {device_id} bucket {bucket}")
            elif ts_us not in stamps or key_of(key[0], ts_us) != key:
                wrong_ts += 1
                examples.note(f"ts {ts_us} was not sent: {device_id} bucket {bucket}")
    missing = sorted(sent.acked - found.keys())
    for device, bucket in missing[:5]:
        examples.note(f"acknowledged, not there: device {device} of the fleet, bucket {bucket}")
    unanswered_found = len((sent.stamps.keys() - sent.acked) & found.keys())
    doubled = total - len(found)
    lines = (
        Line("rows, one per acknowledged device and bucket", len(sent.acked), total, len(missing), strange + doubled),
        Line("rows with the ts of a send of their bucket", total, total - strange - wrong_ts, unexpected=wrong_ts),
        Line("rows marked as of a wrong clock", 0, clock_wrong, unexpected=clock_wrong),
    )
    return _History(lines, unanswered_found)


async def _status(conn: asyncpg.Connection, numbers: dict[str, int], sent: _Sent, examples: _Examples) -> Line:
    """device_last_status: the newest acknowledged ts of each device, or a later one that was never answered."""
    found = {numbers.get(row["device_id"], -1): row["ts_us"] for row in await conn.fetch(_STATUS)}
    missing = unexpected = right = 0
    for device, newest_us in sent.newest.items():
        last_us = found.pop(device, None)
        if last_us is None or last_us < newest_us:
            missing += 1
            examples.note(f"status of device {device} of the fleet is {last_us}, not {newest_us}")
        elif last_us == newest_us or last_us in sent.unanswered.get(device, ()):
            right += 1
        else:
            unexpected += 1
            examples.note(f"status of device {device} of the fleet is {last_us}, which it never sent")
    # what is left belongs to devices of which nothing was acknowledged
    unexpected += sum(last_us not in sent.unanswered.get(device, ()) for device, last_us in found.items())
    return Line("last status with the newest acknowledged ts", len(sent.newest), right, missing, unexpected)
