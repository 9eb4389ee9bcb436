"""Parse the body that a device sends into a Heartbeat, or name its bad fields. Pure: the clock is an argument.

The format is that of the NexMDM agent. Its JSON writer omits nulls and turns every number of battery, system, memory
and network into a double, so any field may be absent, and an integral double is an integer. Fields that nexhb does not
need are ignored, whatever they contain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import msgspec

from nexhb.heartbeat import (
    ALL_SECTIONS,
    APPS,
    BATTERY,
    BUCKET_START,
    MEMORY,
    NETWORK,
    SYSTEM,
    DeviceFacts,
    FieldError,
    Heartbeat,
    Label,
    Refused,
)
from nexhb.ingest import body_repair, json_decoding
from nexhb.ingest.body_schema import (
    NO_BATTERY,
    NO_MEMORY,
    NO_NETWORK,
    NO_SYSTEM,
    Body,
    decode_bodies,
    decode_body,
    decode_items,
    decode_timestamp,
)
from nexhb.postgres.codecs import pack_ip


class ParsedQueue(msgspec.Struct, frozen=True):
    """A replayed queue, or a part of one, after parsing. Its length is the number of items."""

    heartbeats: list[Heartbeat]
    indices: Sequence[int]  # the index of each of these heartbeats in the queue, from 0
    refused: dict[int, Refused]  # index → the errors of that item
    has_timestamp: bool  # whether any item, valid or not, has a readable timestamp_utc

    def __len__(self) -> int:
        return len(self.heartbeats) + len(self.refused)


class HeartbeatRules(NamedTuple):
    """The settings that parsing a heartbeat depends on."""

    unity_package: str
    bucket_seconds: int
    accept_past: timedelta
    accept_future: timedelta


class _Unstorable(Exception):
    """A text contains U+0000."""


def split(body: bytes, *, max_items: int, ndjson: bool | None = None) -> list[bytes]:
    """Split a replayed queue, a JSON array or lines of one heartbeat each (NDJSON), into up to `max_items` items. Blank
    lines do not count.

    If `ndjson` is None, the first character decides whether the body is an array or lines: a client that sends a wrong
    Content-Type, or none, must not have its queue refused, because it would then delete the queue. Raise Refused if the
    body is neither, or has too many items.
    """
    if ndjson is None:
        ndjson = not body.lstrip().startswith(b"[")
    items = body.split(b"\n") if ndjson else json_decoding.decode(decode_items, body)
    if ndjson:
        items = [item for item in items if item.strip()]
    if len(items) > max_items:
        raise Refused([FieldError("", f"has {len(items)} heartbeats; one request takes at most {max_items}")], 413)
    return [bytes(item) for item in items]


def parse(body: bytes, *, device_no: int, device_id: str, received_at: datetime, rules: HeartbeatRules) -> Heartbeat:
    """Return the heartbeat in the body of a request; the device is that of the token. Raise Refused, naming each bad
    field."""
    try:
        return _heartbeats((decode_body(body),), device_no, device_id, received_at, rules)[0]
    except (*json_decoding.UNREADABLE, _Unstorable):
        repaired = body_repair.repaired(body, rules.unity_package)
    return _heartbeats((repaired,), device_no, device_id, received_at, rules)[0]


def parse_many(
    body: bytes,
    *,
    ndjson: bool,
    max_items: int,
    device_no: int,
    device_id: str,
    received_at: datetime,
    rules: HeartbeatRules,
) -> ParsedQueue:
    """Parse a replayed queue like `split` and `parse`, but in half the time. Raise Refused as `split` does."""
    try:
        # One call for all lines (decode_lines) would save 0.4 µs each, but accept two objects on one line as two lines.
        raws = [decode_body(line) for line in body.split(b"\n") if line] if ndjson else decode_bodies(body)
        if len(raws) <= max_items:
            heartbeats = _heartbeats(raws, device_no, device_id, received_at, rules)
            return ParsedQueue(heartbeats, range(len(heartbeats)), {}, bool(heartbeats))
    except (*json_decoding.UNREADABLE, _Unstorable):
        pass  # an item is invalid, or only unusual: parse them one by one
    heartbeats, indices = [], []
    refusals: dict[int, Refused] = {}
    has_timestamp = False
    for index, item in enumerate(split(body, max_items=max_items, ndjson=ndjson)):
        try:
            heartbeat = parse(item, device_no=device_no, device_id=device_id, received_at=received_at, rules=rules)
        except Refused as refused:
            # A copy without a traceback, which would keep this frame, and the block, until garbage is collected.
            refusals[index] = Refused(refused.errors, refused.status)
            has_timestamp = has_timestamp or bool(heartbeats) or _has_timestamp(item)
        else:
            heartbeats.append(heartbeat)
            indices.append(index)
    return ParsedQueue(heartbeats, indices, refusals, has_timestamp or bool(heartbeats))


def _has_timestamp(item: bytes) -> bool:
    """Return whether the item is an object with a readable timestamp_utc: a heartbeat, perhaps with a bad field."""
    try:
        json_decoding.decode(decode_timestamp, item)
    except Refused:
        return False
    return True


def _heartbeats(
    raws: Iterable[Body], device_no: int, device_id: str, received_at: datetime, rules: HeartbeatRules
) -> list[Heartbeat]:
    """Return the heartbeats of decoded bodies, at 1 µs each, without a call per field. Raise _Unstorable."""
    earliest, latest = received_at - rules.accept_past, received_at + rules.accept_future
    package, bucket_seconds = rules.unity_package, rules.bucket_seconds
    made: list[Heartbeat] = []
    for raw in raws:
        battery, system = raw.battery or NO_BATTERY, raw.system or NO_SYSTEM
        memory, network = raw.memory or NO_MEMORY, raw.network or NO_NETWORK
        unity_version, unity_running = _unity(raw, package)
        ts = raw.timestamp_utc if raw.timestamp_utc.tzinfo is UTC else _in_utc(raw.timestamp_utc)
        # If the device's clock is outside the accept window, the time of receipt replaces the timestamp: no heartbeat
        # is lost, and no partition is needed for a distant day.
        if clock_wrong := ts is None or not earliest <= ts <= latest:
            ts = received_at
        since = ts - BUCKET_START  # the same as bucket_of, but without the cost of a call
        seconds = since.days * 86_400 + since.seconds
        ip = pack_ip(network.ip) if network.ip else None
        pct, total, free = battery.pct, memory.total_ram_mb, memory.avail_ram_mb
        signal, uptime, depth = raw.signal_dbm, system.uptime_seconds, raw.queue_depth
        signal = network.signal_dbm if signal is None else signal
        claimed = raw.device_id
        made.append(
            Heartbeat(  # by position: keywords cost 0.1 µs
                device_no,
                device_id,
                ts,
                received_at,
                seconds - seconds % bucket_seconds,
                clock_wrong,
                _label(raw.app_version, unity_version, network.transport, network.ssid, _sections(raw)),
                None if pct is None else round(pct),
                battery.charging,
                battery.temperature_c,
                ip,
                None if signal is None else round(signal),
                None if uptime is None else round(uptime),
                None if total is None or free is None else round(total) - round(free) if total > free else 0,
                unity_running,
                _facts(
                    raw.alias, system.android_version, system.sdk_int, system.patch_level, system.build_id,
                    system.model, system.manufacturer,
                ),
                None if claimed is None or claimed == device_id else str(claimed)[:100],
                None if depth is None else round(depth),
                ("network.ip",) if network.ip and ip is None else (),
            )
        )  # fmt: skip
    return made


def _in_utc(claimed: datetime) -> datetime | None:
    try:
        return claimed.astimezone(UTC)
    except OverflowError:  # a time in year 1 or 9999, whose offset moves it out of the range of datetime
        return None


def _unity(raw: Body, package: str) -> tuple[str | None, bool | None]:
    """Return the version and state of the Unity app, as docs/wire.md defines them. The state is unknown if the app is
    not installed; otherwise it is the state of its process, or if that is absent, whether the app was in the foreground
    within the last 600 s."""
    version: str | None = None
    if raw.app_versions is not None:
        app = raw.app_versions.get(package)
        if app is None or app.installed is False:  # an app without an entry in the map counts as not installed
            return None, None
        version = app.version_name
    if raw.unity_process_running is not None:
        return version, raw.unity_process_running
    recent = raw.monitored_foreground_recent_s
    return version, None if recent is None or round(recent) < 0 else round(recent) < 600


def _sections(raw: Body) -> int:
    """Return the sections that are present, as a sum of BATTERY to APPS."""
    if raw.battery and raw.network and raw.memory and raw.system and raw.app_versions is not None:
        return ALL_SECTIONS
    sections = BATTERY if raw.battery else 0
    sections += NETWORK if raw.network else 0
    sections += MEMORY if raw.memory else 0
    sections += SYSTEM if raw.system else 0
    return sections + (APPS if raw.app_versions is not None else 0)


# A device repeats the same values in every heartbeat. A cache hit costs as much as creating the object (0.1 µs). A miss
# costs 0.5 µs, also if the fleet is larger than the cache. In return the texts are checked only once, and equal objects
# are
# identical and have their hashes computed.


@lru_cache(maxsize=4096)
def _label(
    agent_version: str | None, unity_version: str | None, transport: str | None, ssid: str | None, sections: int
) -> Label:
    _check_storable(f"{agent_version}{unity_version}{transport}{ssid}")
    return Label(agent_version or "", unity_version or "", transport or "", ssid or "", sections)


@lru_cache(maxsize=4096)
def _facts(  # noqa: PLR0917 - the arguments are the cache's key, and keywords would double the cost
    alias: str | None,
    android_version: str | None,
    sdk_int: float | None,
    patch_level: str | None,
    build_id: str | None,
    model: str | None,
    manufacturer: str | None,
) -> DeviceFacts:
    _check_storable(f"{alias}{android_version}{patch_level}{build_id}{model}{manufacturer}")
    return DeviceFacts(
        alias or None,
        android_version or None,
        None if sdk_int is None else round(sdk_int),
        patch_level or None,
        build_id or None,
        model or None,
        manufacturer or None,
    )


def _check_storable(texts: str) -> None:
    if "\0" in texts:
        raise _Unstorable
