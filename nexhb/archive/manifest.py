"""The manifest of an archive. Pure.

An archive is one CSV stream, compressed and cut into objects, and a manifest, which is written last. The same rows give
the same manifest, byte for byte, and names contain the SHA-256 of the content. So archiving the same rows again
overwrites nothing and stores nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from nexhb.errors import ArchiveDamaged
from nexhb.heartbeat import CONTENT

FORMAT_1 = "nexhb-archive-1"  # the first format: columns are not packed, and the manifest has no bucket_seconds
LAST_FORMAT = max(2, *(column.archive_format for column in CONTENT))
FORMAT = f"nexhb-archive-{LAST_FORMAT}"  # the format that is written; earlier formats can be read

# Limits of the memory of a reader, whatever the store contains. No archive that nexhb writes exceeds them.
MAX_MANIFEST_BYTES = 1 << 20  # enough: a day of a million devices has about 200 objects, listed with 150 bytes each
MAX_OBJECTS = 4_096
MAX_OBJECT_BYTES = 256 << 20  # compressed
MAX_LINE_BYTES = 64 << 10  # limit of a CSV row; its texts are at most 3 kB, because they must fit into an index entry
MAX_RANGE = timedelta(days=36_600)


def _plain(number: int) -> tuple[str, ...]:
    """Return a heartbeat's columns, without the columns that formats later than `number` have added."""
    content = (column.name for column in CONTENT if column.archive_format <= number)
    return ("device_id", "ts", "received_at", "clock_wrong", *content, "device_no", "bucket")


def _added(number: int) -> tuple[str, ...]:
    """Return the columns that the third and later formats, up to format `number`, have added."""
    return tuple(column.name for column in CONTENT if 2 < column.archive_format <= number)


# A heartbeat's columns as `archive get` and `archive restore --into` show them.
COLUMNS = _plain(LAST_FORMAT)

# The second format's columns in order; the columns that people search for most often come first.
# sql/queries/archive.sql packs their values, packed.py unpacks them.
_PACKED_2 = (
    "device_id", "device_no", "agent_version", "unity_pkg_version", "network_type", "ssid", "ip", "clock_wrong",
    "plugged", "up_since", "received_at", "uptime_s", "bucket", "battery_pct", "ts", "received_after_us", "ram_used_mb",
    "temp_c", "signal_dbm", "unity_running",
)  # fmt: skip
STREAM_COLUMNS = {FORMAT_1: _plain(1)} | {
    f"nexhb-archive-{number}": (*_PACKED_2, *_added(number)) for number in range(2, LAST_FORMAT + 1)
}
PACKED = STREAM_COLUMNS[FORMAT]


def added_to(packed: Sequence[str]) -> str:
    """Return the columns of a packed format that the second format lacks, as the end of a list: `, a, b`."""
    return "".join(f", {name}" for name in packed[len(_PACKED_2) :])


class Object(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the compressed stream."""

    name: str
    bytes: int
    sha256: str  # hex


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One archive: a day, or a supplement with its late heartbeats."""

    format: str = FORMAT
    kind: str  # day | late
    partition: str
    range_start: datetime  # UTC
    range_end: datetime
    schema_version: int
    bucket_seconds: int | None = None  # used to compute a bucket that the CSV leaves empty; None in FORMAT_1
    columns: tuple[str, ...]
    rows: int
    min_ts: datetime | None
    max_ts: datetime | None
    compression: str = "zstd"
    stream_bytes: int  # size of the CSV, header included
    stream_sha256: str  # SHA-256 of the CSV, hex
    objects: tuple[Object, ...]

    @property
    def bytes(self) -> int:
        """The size of all objects."""
        return sum(item.bytes for item in self.objects)


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as it is stored: indented JSON, the same bytes for the same manifest."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(raw: bytes) -> Manifest:
    """Parse a manifest. Raises ArchiveDamaged if it is invalid, of an unknown format, or outside the limits above."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArchiveDamaged(f"The manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveDamaged(f"The manifest cannot be read: {error}.") from error
    if manifest.format not in STREAM_COLUMNS or manifest.compression != "zstd":
        known = " and ".join(STREAM_COLUMNS)
        raise ArchiveDamaged(
            f"The format is {manifest.format}, {manifest.compression}; this version of nexhb reads {known}, zstd."
        )
    if manifest.format != FORMAT_1 and not manifest.bucket_seconds:
        raise ArchiveDamaged("The manifest lacks bucket_seconds.")
    if violation := next(_violations(manifest), None):
        raise ArchiveDamaged(f"The manifest has values that nexhb never writes: {violation}.")
    return manifest


def _violations(manifest: Manifest) -> Iterator[str]:
    """Yield each thing in the manifest that nexhb never writes."""
    for moment in (manifest.range_start, manifest.range_end, manifest.min_ts, manifest.max_ts):
        if moment is not None and moment.utcoffset() != UTC.utcoffset(None):
            yield f"a time that is not UTC, {moment}"
            return  # a time without a zone cannot be compared below
    if (
        manifest.kind not in ("day", "late")
        or not 0 < len(manifest.partition.encode()) <= 63
        or "\0" in manifest.partition
    ):
        yield f"kind {manifest.kind[:20]!r} of partition {manifest.partition[:80]!r}"
    if not timedelta() < manifest.range_end - manifest.range_start <= MAX_RANGE:
        yield f"the range {manifest.range_start} to {manifest.range_end}"
    if manifest.columns != STREAM_COLUMNS[manifest.format]:
        yield "columns that are not those of its format"
    if manifest.bucket_seconds is not None and not 0 < manifest.bucket_seconds <= 86_400:
        yield f"buckets of {manifest.bucket_seconds} s"
    if not (0 <= manifest.rows <= 1 << 48 and 0 < manifest.stream_bytes <= (manifest.rows + 1) * MAX_LINE_BYTES):
        yield f"{manifest.rows} rows in {manifest.stream_bytes} bytes"
    if not _HASH.fullmatch(manifest.stream_sha256):
        yield "an invalid SHA-256 of the stream"
    if not 0 < len(manifest.objects) <= MAX_OBJECTS:
        yield f"{len(manifest.objects)} objects"
    for number, item in enumerate(manifest.objects):
        if not (0 < item.bytes <= MAX_OBJECT_BYTES and _HASH.fullmatch(item.sha256)):
            yield f"object {number} of {item.bytes} bytes"
        # An arbitrary name could point anywhere in the store.
        if item.name != object_name(manifest.partition, manifest.kind, number, item.sha256):
            yield f"object {number} named {item.name[:200]!r}"


MANIFEST_NAME = re.compile(r"[^/.\0][^/\0]*/(day|late)-manifest-([0-9a-f]{16})\.json")
_HASH = re.compile("[0-9a-f]{64}")


def object_name(partition: str, kind: str, number: int, sha256: str) -> str:
    """Return the name of an object with this content."""
    return f"{folder_of(partition)}/{kind}-{number:04d}-{sha256[:16]}.csv.zst"


def manifest_name(partition: str, kind: str, sha256: str) -> str:
    """Return the name of a manifest with this content."""
    return f"{folder_of(partition)}/{kind}-manifest-{sha256[:16]}.json"


def folder_of(partition: str) -> str:
    """Return the folder of a day's objects. A table may have any name, but a folder name must not contain `/` or be
    hidden. Two tables may share a folder, because each manifest names its own objects."""
    name = partition.replace("/", "_")
    return f"_{name}" if name.startswith(".") else name
