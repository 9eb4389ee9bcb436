"""What an archive says of itself. Pure.

An archive is one CSV stream, compressed and cut into objects, and a manifest that is written last. The same rows make
the same manifest to the last byte, and names carry the SHA-256 of what they name: an archive that is made again
overwrites nothing and stores nothing twice.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from nexhb.errors import ArchiveDamaged

FORMAT = "nexhb-archive-1"
MOST_BYTES = 1 << 20  # of a manifest: a day of a million devices is some 200 objects of 150 bytes each

# The stream's columns, in their order. The first is what people look for; the key, whose order the rows have, is last.
COLUMNS = (
    "device_id", "ts", "received_at", "clock_wrong", "battery_pct", "plugged", "temp_c", "network_type", "ssid",
    "ip", "signal_dbm", "uptime_s", "ram_used_mb", "unity_pkg_version", "unity_running", "agent_version", "device_no",
    "bucket",
)  # fmt: skip


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
    """Raises ArchiveDamaged where it is none, or of a format that this nexhb does not know."""
    try:
        found = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArchiveDamaged(f"The manifest cannot be read: {error}.") from error
    if found.format != FORMAT or found.compression != "zstd":
        raise ArchiveDamaged(f"Its format is {found.format}, {found.compression}; this nexhb reads {FORMAT}, zstd.")
    for moment in (found.range_start, found.range_end, found.min_ts, found.max_ts):
        if moment is not None and moment.utcoffset() != UTC.utcoffset(None):
            raise ArchiveDamaged(f"The manifest has a time that is not UTC: {moment}.")
    return found


def object_name(partition: str, kind: str, number: int, sha256: str) -> str:
    """The name of an object, by what is in it."""
    return f"{_folder(partition)}/{kind}-{number:04d}-{sha256[:16]}.csv.zst"


def manifest_name(partition: str, kind: str, sha256: str) -> str:
    """The name of a manifest, by what is in it."""
    return f"{_folder(partition)}/{kind}-manifest-{sha256[:16]}.json"


def _folder(partition: str) -> str:
    """A table may have any name; a folder has one part, and is not hidden. What is in it says whose it is."""
    name = partition.replace("/", "_")
    return f"_{name}" if name.startswith(".") else name
