"""What an archive says of itself. Pure.

An archive is one CSV stream, compressed and cut into objects, and a manifest that is written last. The same rows make
the same manifest to the last byte, and names carry the SHA-256 of what they name: an archive that is made again
overwrites nothing and stores nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import msgspec

from nexhb.errors import ArchiveDamaged

FORMAT = "nexhb-archive-2"  # what is written; both are read
FORMER = "nexhb-archive-1"  # every column as it is, without bucket_seconds

# What nothing that nexhb wrote exceeds: whoever reads an archive holds no more at a time, whatever lies in the store.
MOST_BYTES = 1 << 20  # of a manifest: a day of a million devices is some 200 objects of 150 bytes each
MOST_OBJECTS = 4_096
MOST_OBJECT_BYTES = 256 << 20  # compressed
MOST_LINE_BYTES = 64 << 10  # of the stream; the texts of a row are 3 kB at most, as an index holds them
MOST_RANGE = timedelta(days=36_600)

# A heartbeat's columns, as it is handed to people: `archive get`, `archive restore --into`; a stream's in FORMER.
COLUMNS = (
    "device_id", "ts", "received_at", "clock_wrong", "battery_pct", "plugged", "temp_c", "network_type", "ssid",
    "ip", "signal_dbm", "uptime_s", "ram_used_mb", "unity_pkg_version", "unity_running", "agent_version", "device_no",
    "bucket",
)  # fmt: skip

# The stream's columns, in their order: first what people look for. sql/queries/archive.sql packs, packed.py unpacks.
PACKED = (
    "device_id", "device_no", "agent_version", "unity_pkg_version", "network_type", "ssid", "ip", "clock_wrong",
    "plugged", "up_since", "received_at", "uptime_s", "bucket", "battery_pct", "ts", "received_after_us", "ram_used_mb",
    "temp_c", "signal_dbm", "unity_running",
)  # fmt: skip
STREAM_COLUMNS = {FORMER: COLUMNS, FORMAT: PACKED}


class Object(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the compressed stream."""

    name: str
    bytes: int
    sha256: str  # hex


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One archive: a day, or what came late for it."""

    format: str = FORMAT
    kind: str  # day | late
    partition: str
    range_start: datetime  # UTC
    range_end: datetime
    schema_version: int
    bucket_seconds: int | None = None  # what an empty bucket is reckoned with; none in FORMER
    columns: tuple[str, ...]
    rows: int
    min_ts: datetime | None
    max_ts: datetime | None
    compression: str = "zstd"
    stream_bytes: int  # of the CSV, header included
    stream_sha256: str  # hex, of the same
    objects: tuple[Object, ...]

    @property
    def bytes(self) -> int:
        """Of all objects."""
        return sum(one.bytes for one in self.objects)


def encode(manifest: Manifest) -> bytes:
    """As it is stored: JSON for people, the same bytes for the same manifest."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(raw: bytes) -> Manifest:
    """Raises ArchiveDamaged where it is none, of a format that this nexhb does not know, or not what nexhb writes."""
    if len(raw) > MOST_BYTES:
        raise ArchiveDamaged(f"The manifest is larger than {MOST_BYTES} bytes.")
    try:
        found = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveDamaged(f"The manifest cannot be read: {error}.") from error
    if found.format not in STREAM_COLUMNS or found.compression != "zstd":
        known = " and ".join(STREAM_COLUMNS)
        raise ArchiveDamaged(f"Its format is {found.format}, {found.compression}; this nexhb reads {known}, zstd.")
    if found.format == FORMAT and not found.bucket_seconds:
        raise ArchiveDamaged("The manifest does not say how long a bucket is.")
    if wrong := next(_out_of_bounds(found), None):
        raise ArchiveDamaged(f"The manifest is none that nexhb writes: {wrong}.")
    return found


def _out_of_bounds(found: Manifest) -> Iterator[str]:
    """What no manifest of nexhb's has."""
    for moment in (found.range_start, found.range_end, found.min_ts, found.max_ts):
        if moment is not None and moment.utcoffset() != UTC.utcoffset(None):
            yield f"a time that is not UTC, {moment}"
            return  # it cannot be compared
    if found.kind not in ("day", "late") or not 0 < len(found.partition.encode()) <= 63 or "\0" in found.partition:
        yield f"kind {found.kind[:20]!r} of partition {found.partition[:80]!r}"
    if not timedelta() < found.range_end - found.range_start <= MOST_RANGE:
        yield f"the range {found.range_start} to {found.range_end}"
    if found.columns != STREAM_COLUMNS[found.format]:
        yield "other columns than those of its format"
    if found.bucket_seconds is not None and not 0 < found.bucket_seconds <= 86_400:
        yield f"buckets of {found.bucket_seconds} s"
    if not (0 <= found.rows <= 1 << 48 and 0 < found.stream_bytes <= (found.rows + 1) * MOST_LINE_BYTES):
        yield f"{found.rows} rows in {found.stream_bytes} bytes"
    if not _HASH.fullmatch(found.stream_sha256):
        yield "the stream's SHA-256"
    if not 0 < len(found.objects) <= MOST_OBJECTS:
        yield f"{len(found.objects)} objects"
    for number, one in enumerate(found.objects):
        if not (0 < one.bytes <= MOST_OBJECT_BYTES and _HASH.fullmatch(one.sha256)):
            yield f"object {number} of {one.bytes} bytes"
        # A name that says something else could lead anywhere.
        if one.name != object_name(found.partition, found.kind, number, one.sha256):
            yield f"object {number} named {one.name[:200]!r}"


MANIFEST_NAME = re.compile(r"[^/.\0][^/\0]*/(day|late)-manifest-([0-9a-f]{16})\.json")
_HASH = re.compile("[0-9a-f]{64}")


def object_name(partition: str, kind: str, number: int, sha256: str) -> str:
    """The name of an object, by what is in it."""
    return f"{folder_of(partition)}/{kind}-{number:04d}-{sha256[:16]}.csv.zst"


def manifest_name(partition: str, kind: str, sha256: str) -> str:
    """The name of a manifest, by what is in it."""
    return f"{folder_of(partition)}/{kind}-manifest-{sha256[:16]}.json"


def folder_of(partition: str) -> str:
    """Where a day's objects lie. A table may have any name; a folder has one part, and is not
    hidden. What is in it says whose it is."""
    name = partition.replace("/", "_")
    return f"_{name}" if name.startswith(".") else name
