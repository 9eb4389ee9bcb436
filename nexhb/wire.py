"""What a device sends → a Heartbeat, or the fields that are wrong. Pure: the clock is an argument.

The shape is the NexMDM agent's. Its JSON writer omits nulls and turns every number of battery, system, memory
and network into a double, so any field may be absent and an integral double is an integer. Fields that nexhb does
not need are not looked at, whatever they hold.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

BUCKET_EPOCH = 1_577_836_800  # 2020-01-01T00:00:00Z: buckets count from here, so that int4 lasts until 2088

_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)

T = TypeVar("T")

INT32_MAX = 2**31 - 1
INT16_MAX = 2**15 - 1
_FLOAT32_MAX = 3.4e38


class FieldError(NamedTuple):
    """One thing wrong with a body: where (dotted path, empty for the whole), and what it takes."""

    path: str
    message: str


class Refused(Exception):
    """The body will never be a heartbeat. `status` is the HTTP status that says why."""

    def __init__(self, errors: list[FieldError], status: int = 422) -> None:
        self.errors = errors
        self.status = status
        super().__init__("; ".join(f"{e.path}: {e.message}" if e.path else e.message for e in errors))


class DeviceFacts(NamedTuple):
    """What a heartbeat says of the device itself; it changes rarely and is kept on `devices`."""

    alias: str | None
    android_version: str | None
    sdk_int: int | None
    patch_level: str | None
    build_id: str | None
    model: str | None
    manufacturer: str | None


# The sections of a heartbeat. One that is present states all of its fields, since the agent omits nulls; of one that is
# absent nothing is said.
BATTERY, NETWORK, MEMORY, SYSTEM, APPS = 1, 2, 4, 8, 16
ALL_SECTIONS = BATTERY | NETWORK | MEMORY | SYSTEM | APPS


class Label(NamedTuple):
    """What most heartbeats share, stored once: texts, empty where unknown, and the sections that were present."""

    agent_version: str
    unity_pkg_version: str
    network_type: str
    ssid: str
    sections: int = ALL_SECTIONS


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """One heartbeat, valid, as it will be stored."""

    device_no: int
    device_id: str
    ts: datetime  # when it was made (device's clock), or when it was received where that clock is wrong; UTC
    received_at: datetime
    bucket: int  # start of the 10 s of `ts` that admit one row a device, in seconds since BUCKET_EPOCH
    clock_wrong: bool
    label: Label
    battery_pct: int | None
    plugged: bool | None
    temp_c: float | None
    ip: bytes | None  # as PostgreSQL's inet travels in binary
    signal_dbm: int | None
    uptime_s: int | None
    ram_used_mb: int | None
    unity_running: bool | None
    facts: DeviceFacts
    claimed_device_id: str | None  # set only where it is not the token's
    queue_depth: int | None
    dropped: tuple[str, ...]  # optional fields stored as null, being unreadable


class Queue(msgspec.Struct, frozen=True):
    """A replayed queue, or a part of it, read. Its length is that of the queue, in items."""

    heartbeats: list[Heartbeat]
    places: Sequence[int]  # of these heartbeats in the queue, from 0
    refused: dict[int, Refused]  # place → what is wrong with that one
    understood: bool  # whether any of them says when it was made, the refused ones included

    def __len__(self) -> int:
        return len(self.heartbeats) + len(self.refused)


class Rules(NamedTuple):
    """What the configuration says of heartbeats."""

    unity_package: str
    bucket_seconds: int
    accept_past: timedelta
    accept_future: timedelta


# ---- the shape ------------------------------------------------------------------------------------------------
#
# Two of them: the usual body, whose decoder checks every type, length and range by itself (1.0 µs, and nothing is left
# to be looked at), and below it what is tried where that fails: it takes whatever a heartbeat may be made of, is then
# looked at field by field, and names what is wrong.

_Text32 = Annotated[str, msgspec.Meta(max_length=32)]
_Text50 = Annotated[str, msgspec.Meta(max_length=50)]
_Text100 = Annotated[str, msgspec.Meta(max_length=100)]
_Text200 = Annotated[str, msgspec.Meta(max_length=200)]
_Number = float | None
_Zoned = Annotated[datetime, msgspec.Meta(tz=True)]
# What rounds to a whole number within the range: 100.5 is 100 and -0.5 is 0, a half going to the even one.
_Percent = Annotated[float, msgspec.Meta(ge=-0.5, le=100.5)]
_Count = Annotated[float, msgspec.Meta(ge=-0.5, lt=INT32_MAX + 0.5)]
_Signal = Annotated[float, msgspec.Meta(ge=-INT16_MAX - 1.5, lt=INT16_MAX + 0.5)]
_Seconds = Annotated[float, msgspec.Meta(ge=-INT32_MAX, le=INT32_MAX)]
_Real = Annotated[float, msgspec.Meta(gt=-_FLOAT32_MAX, lt=_FLOAT32_MAX)]
_Depth = Annotated[float, msgspec.Meta(ge=0, le=INT32_MAX)]


class _Battery(msgspec.Struct, gc=False):
    pct: _Percent | None = None
    charging: bool | None = None
    temperature_c: _Real | None = None


class _System(msgspec.Struct, gc=False):
    uptime_seconds: _Count | None = None
    android_version: _Text50 | None = None
    sdk_int: _Count | None = None
    patch_level: _Text50 | None = None
    build_id: _Text100 | None = None
    model: _Text100 | None = None
    manufacturer: _Text100 | None = None


class _Memory(msgspec.Struct, gc=False):
    total_ram_mb: _Count | None = None
    avail_ram_mb: _Count | None = None


class _Network(msgspec.Struct, gc=False):
    transport: _Text32 | None = None
    ssid: _Text100 | None = None
    ip: _Text100 | None = None
    signal_dbm: _Signal | None = None


class _App(msgspec.Struct, gc=False):
    installed: bool | None = None
    version_name: _Text100 | None = None


class _Body(msgspec.Struct, gc=False, kw_only=True):
    # In the agent's order: the decoder looks for the next field where the last one was found.
    device_id: str | None = None
    alias: _Text200 | None = None
    app_version: _Text50 | None = None
    timestamp_utc: _Zoned
    app_versions: dict[str, _App | None] | None = None
    battery: _Battery | None = None
    system: _System | None = None
    memory: _Memory | None = None
    network: _Network | None = None
    queue_depth: _Depth | None = None
    signal_dbm: _Signal | None = None
    monitored_foreground_recent_s: _Seconds | None = None
    unity_process_running: bool | None = None


class _When(msgspec.Struct, gc=False):
    timestamp_utc: _Zoned


class _LooseBattery(_Battery, gc=False):
    pct: _Number = None
    temperature_c: _Number = None


class _LooseSystem(_System, gc=False):
    uptime_seconds: _Number = None
    sdk_int: _Number = None


class _LooseMemory(_Memory, gc=False):
    total_ram_mb: _Number = None
    avail_ram_mb: _Number = None


class _LooseNetwork(_Network, gc=False):
    signal_dbm: _Number = None


class _LooseBody(_Body, gc=False, kw_only=True):
    # Raw: of these, whatever stands there is no reason to refuse, or only where it is Unity's. A mended body has in
    # their places what _Body has.
    device_id: msgspec.Raw = msgspec.Raw()  # type: ignore[assignment]
    app_versions: dict[str, msgspec.Raw] | None = None  # type: ignore[assignment]
    battery: _LooseBattery | None = None
    system: _LooseSystem | None = None
    memory: _LooseMemory | None = None
    network: _LooseNetwork | None = None
    queue_depth: msgspec.Raw = msgspec.Raw()  # type: ignore[assignment]
    signal_dbm: _Number = None
    monitored_foreground_recent_s: _Number = None


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_bodies = msgspec.json.Decoder(list[_Body]).decode
_decode_loose = msgspec.json.Decoder(_LooseBody).decode
_decode_when = msgspec.json.Decoder(_When).decode
_decode_app = msgspec.json.Decoder(_App | None).decode
_decode_anything = msgspec.json.Decoder().decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NO_BATTERY, _NO_SYSTEM, _NO_MEMORY, _NO_NETWORK = _Battery(), _System(), _Memory(), _Network()
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Unstorable(Exception):
    """A text holds U+0000."""


def split(body: bytes, *, most: int, ndjson: bool | None = None) -> list[bytes]:
    """A replayed queue: a JSON array, or one heartbeat a line (NDJSON). Which it is, its first character says where
    nobody else does: a client that names the wrong type, or none, must not find its queue refused and deleted. At most
    `most` of them; blank lines do not count.

    Raises Refused where it is neither, or too long.
    """
    if ndjson is None:
        ndjson = not body.lstrip().startswith(b"[")
    items = body.split(b"\n") if ndjson else _decode(_decode_items, body)
    found = [item for item in items if item.strip()] if ndjson else items
    if len(found) > most:
        raise Refused([FieldError("", f"at most {most} heartbeats in one request, these are {len(found)}")], 413)
    return [bytes(item) for item in found]


# ---- body → Heartbeat -----------------------------------------------------------------------------------------


def parse(body: bytes, *, device_no: int, device_id: str, received_at: datetime, rules: Rules) -> Heartbeat:
    """One heartbeat of the device that the token names. Raises Refused, naming each bad field."""
    try:
        return _heartbeats((_decode_body(body),), device_no, device_id, received_at, rules)[0]
    except (*_UNREADABLE, _Unstorable):
        mended = _mended(body, rules.unity_package)
    return _heartbeats((mended,), device_no, device_id, received_at, rules)[0]


def parse_many(
    body: bytes, *, ndjson: bool, most: int, device_no: int, device_id: str, received_at: datetime, rules: Rules
) -> Queue:
    """A replayed queue: what `split` and `parse` make of it one by one, in half the time. Raises as `split` does."""
    try:
        # One call for all lines (decode_lines) would save 0.4 µs each, and take two objects on one line for two lines.
        raws = [_decode_body(line) for line in body.split(b"\n") if line] if ndjson else _decode_bodies(body)
        if len(raws) <= most:
            heartbeats = _heartbeats(raws, device_no, device_id, received_at, rules)
            return Queue(heartbeats, range(len(heartbeats)), {}, bool(heartbeats))
    except (*_UNREADABLE, _Unstorable):
        pass  # one of them is wrong, or just unusual: each for itself
    found: list[tuple[int, Heartbeat]] = []
    refusals: dict[int, Refused] = {}
    understood = False
    for place, item in enumerate(split(body, most=most, ndjson=ndjson)):
        try:
            one = parse(item, device_no=device_no, device_id=device_id, received_at=received_at, rules=rules)
            found.append((place, one))
        except Refused as refused:
            # Its like, without a traceback: that holds this frame, which holds it, and so the block until the collector
            # comes.
            refusals[place] = Refused(refused.errors, refused.status)
            understood = understood or bool(found) or _says_when(item)
    return Queue([one for _, one in found], [place for place, _ in found], refusals, understood or bool(found))


def _says_when(item: bytes) -> bool:
    """Whether it is a heartbeat, though perhaps one with a bad field: an object with a readable timestamp_utc."""
    try:
        _decode(_decode_when, item)
    except Refused:
        return False
    return True


def _heartbeats(
    raws: Iterable[_Body], device_no: int, device_id: str, received_at: datetime, rules: Rules
) -> list[Heartbeat]:
    """What these bodies say; 1 µs each, having no call for each field. Raises _Unstorable."""
    earliest, latest = received_at - rules.accept_past, received_at + rules.accept_future
    package, bucket_seconds = rules.unity_package, rules.bucket_seconds
    made: list[Heartbeat] = []
    for raw in raws:
        battery, system = raw.battery or _NO_BATTERY, raw.system or _NO_SYSTEM
        memory, network = raw.memory or _NO_MEMORY, raw.network or _NO_NETWORK
        unity_version, unity_running = _unity(raw, package)
        ts = raw.timestamp_utc if raw.timestamp_utc.tzinfo is UTC else _in_utc(raw.timestamp_utc)
        # A clock outside the accept window loses no heartbeat and harms no partition: the time of receipt counts.
        if clock_wrong := ts is None or not earliest <= ts <= latest:
            ts = received_at
        since = ts - _EPOCH  # bucket_of, without the call
        seconds = since.days * 86_400 + since.seconds
        ip = pack_ip(network.ip) if network.ip else None
        pct, total, free = battery.pct, memory.total_ram_mb, memory.avail_ram_mb
        signal, uptime, depth = raw.signal_dbm, system.uptime_seconds, raw.queue_depth
        signal = network.signal_dbm if signal is None else signal
        claimed = raw.device_id
        made.append(
            Heartbeat(  # by position: names cost 0.1 µs
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


def _decode(decoder: Callable[[bytes], T], body: bytes) -> T:
    try:
        return decoder(body)
    except _UNREADABLE as error:
        # Half a character (`\ud83d` alone) is refused by the decoder wherever it stands, also in a field that nobody
        # needs. As U+0000 it is refused only where it would be stored, and by that field's name.
        whole = _without_halves(body) if b"\\u" in body else body
        if whole == body:
            raise _refused_json(error, body) from None
    return _decode(decoder, whole)


# As much as there is without half a character in between, as a group; or one half. A match for each escape instead, and
# a function called for it, took five times as long.
_HALVES = re.compile(
    rb"((?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(?!u[dD][89a-fA-F][0-9a-fA-F]{2}).?)++)"
    rb"|\\u.{4}",
    re.DOTALL,
)


def _without_halves(body: bytes) -> bytes:
    return b"".join([run or rb"\u0000" for run in _HALVES.findall(body)])


def bucket_of(ts: datetime, bucket_seconds: int) -> int:
    """Start of the bucket that `ts` lies in, in seconds since BUCKET_EPOCH."""
    since = ts - _EPOCH
    seconds = since.days * 86_400 + since.seconds
    return seconds - seconds % bucket_seconds


def _in_utc(claimed: datetime) -> datetime | None:
    try:
        return claimed.astimezone(UTC)
    except OverflowError:  # year 1 or 9999 with an offset
        return None


def _unity(raw: _Body, package: str) -> tuple[str | None, bool | None]:
    """Version and state of the Unity app, as wire.md rules: not installed → unknown; the process says; else how
    long ago it was in the foreground, 600 s being the limit."""
    version: str | None = None
    if raw.app_versions is not None:
        app = raw.app_versions.get(package)
        if app is None or app.installed is False:  # a map that does not name it: not installed
            return None, None
        version = app.version_name
    if raw.unity_process_running is not None:
        return version, raw.unity_process_running
    recent = raw.monitored_foreground_recent_s
    return version, None if recent is None or round(recent) < 0 else round(recent) < 600


def _sections(raw: _Body) -> int:
    """The sections that are present, as a sum of BATTERY to APPS."""
    if raw.battery and raw.network and raw.memory and raw.system and raw.app_versions is not None:
        return ALL_SECTIONS
    found = BATTERY if raw.battery else 0
    found += NETWORK if raw.network else 0
    found += MEMORY if raw.memory else 0
    found += SYSTEM if raw.system else 0
    return found + (APPS if raw.app_versions is not None else 0)


# A device says the same in every heartbeat. Finding these again costs what making them anew would (0.1 µs each; the
# first time, or where the fleet is larger than the cache, 0.5), and in return their texts are looked through once, and
# whoever looks an equal one up finds its hashes made.


@lru_cache(maxsize=4096)
def _label(
    agent_version: str | None, unity_version: str | None, transport: str | None, ssid: str | None, sections: int
) -> Label:
    _check_storable(f"{agent_version}{unity_version}{transport}{ssid}")
    return Label(agent_version or "", unity_version or "", transport or "", ssid or "", sections)


@lru_cache(maxsize=4096)
def _facts(  # noqa: PLR0917 - they are the cache's key, and names would cost as much as the rest
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


_PG_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_int64 = struct.Struct("!q")


def pack_moment(moment: datetime) -> bytes:
    """A moment in PostgreSQL's binary form of timestamptz: µs since 2000."""
    since = moment - _PG_EPOCH
    return _int64.pack((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)


def unpack_moment(packed: bytes) -> datetime:
    """The moment again. Raises OverflowError for infinity, which no table of nexhb holds."""
    return _PG_EPOCH + timedelta(microseconds=_int64.unpack(packed)[0])


@lru_cache(maxsize=16_384)  # a fleet's addresses repeat with every heartbeat; parsing one costs 2 µs, a hit 0.1
def pack_ip(text: str) -> bytes | None:
    """An address in PostgreSQL's binary form of inet, or None where it is not one. A zone (`%wlan0`) is dropped."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0].strip())
    except ValueError:
        return None
    family, bits = (2, 32) if address.version == 4 else (3, 128)
    return bytes((family, bits, 0, bits // 8)) + address.packed


# ---- what the usual shape does not take -------------------------------------------------------------------------


def _mended(body: bytes, package: str) -> _Body:
    """What is valid all the same: a device_id that is no text, another app's odd entry, half a character where nobody
    needs it. Raises Refused, naming each bad field."""
    raw = _decode(_decode_loose, body)
    path = f"app_versions.{package}"
    errors: list[FieldError] = []
    apps = app = None
    if raw.app_versions is not None:
        app = _mended_app(raw.app_versions.get(package), path, errors)
        apps = {package: app}
    if apps is None or (app is not None and app.installed is not False):
        errors += _wrong((f"{path}.version_name", app.version_name if app else None, 0, 0))
        if raw.unity_process_running is None:
            recent = raw.monitored_foreground_recent_s
            errors += _wrong(("monitored_foreground_recent_s", recent, -INT32_MAX, INT32_MAX))
    errors += _wrong(*_needed(raw))
    if errors:
        raise Refused(errors)
    return msgspec.structs.replace(
        raw, device_id=_said(raw.device_id), app_versions=apps, queue_depth=_queue_depth(raw.queue_depth)
    )


def _mended_app(found: msgspec.Raw | None, path: str, errors: list[FieldError]) -> _App | None:
    try:
        return _decode_app(found) if found else None
    except _UNREADABLE as error:
        refused = _refused_json(error, bytes(found or b""))
        errors += [FieldError(_join(path, wrong.path), wrong.message) for wrong in refused.errors]
        return None


_Checked = tuple[str, str | float | None, float, float]  # path, value, and the limits of a number


def _needed(raw: _LooseBody) -> Iterator[_Checked]:
    system, battery = raw.system or _NO_SYSTEM, raw.battery or _NO_BATTERY
    memory, network = raw.memory or _NO_MEMORY, raw.network or _NO_NETWORK
    signal = network.signal_dbm if raw.signal_dbm is None else raw.signal_dbm
    yield "memory.total_ram_mb", memory.total_ram_mb, 0, INT32_MAX
    yield "memory.avail_ram_mb", memory.avail_ram_mb, 0, INT32_MAX
    yield "app_version", raw.app_version, 0, 0
    yield "network.transport", network.transport, 0, 0
    yield "network.ssid", network.ssid, 0, 0
    yield "battery.pct", battery.pct, 0, 100
    yield "battery.temperature_c", battery.temperature_c, -_FLOAT32_MAX, _FLOAT32_MAX
    yield "signal_dbm", signal, -INT16_MAX - 1, INT16_MAX
    yield "system.uptime_seconds", system.uptime_seconds, 0, INT32_MAX
    yield "alias", raw.alias, 0, 0
    yield "system.android_version", system.android_version, 0, 0
    yield "system.sdk_int", system.sdk_int, 0, INT32_MAX
    yield "system.patch_level", system.patch_level, 0, 0
    yield "system.build_id", system.build_id, 0, 0
    yield "system.model", system.model, 0, 0
    yield "system.manufacturer", system.manufacturer, 0, 0


def _wrong(*fields: _Checked) -> Iterator[FieldError]:
    for path, value, low, high in fields:
        if isinstance(value, str):
            if "\0" in value:
                yield FieldError(path, "holds a character that cannot be stored: U+0000, or half of one")
        elif value is None:
            continue
        elif high == _FLOAT32_MAX:
            if not low < value < high:
                yield FieldError(path, f"is out of range: {value:.12g}")
        elif not low <= round(value) <= high:
            yield FieldError(path, f"takes {low} to {high}, not {value:.12g}")


def _said(device_id: msgspec.Raw) -> Any:
    try:
        return _decode_anything(device_id) if device_id else None
    except _UNREADABLE:
        return "unreadable"


def _queue_depth(raw: msgspec.Raw) -> float | None:
    try:
        value: Any = _decode_anything(raw) if raw else None
    except _UNREADABLE:
        return None
    return value if isinstance(value, int | float) and 0 <= value <= INT32_MAX else None


# ---- what is wrong, said so that a person finds it --------------------------------------------------------------


def _refused_json(error: Exception, body: bytes) -> Refused:
    if isinstance(error, RecursionError):
        return Refused([FieldError("", "is nested too deeply")], 400)
    if isinstance(error, msgspec.ValidationError):
        message, _, path = str(error).partition(" - at `")
        if "missing required field" in message:
            message, field = "is required", message.rpartition("`")[0].rpartition("`")[2]
            return Refused([FieldError(_join(_path(path), field), message)])
        return Refused([FieldError(_path(path), _say(message))])
    if not body.strip():
        return Refused([FieldError("", "is empty: a JSON object is expected")], 400)
    return Refused([FieldError("", f"is not JSON: {error}")], 400)


def _path(text: str) -> str:
    return text.strip("`").removeprefix("$").removeprefix(".")


def _join(left: str, right: str) -> str:
    return f"{left}.{right}" if left and right else left or right


def _say(message: str) -> str:
    return message[:1].lower() + message[1:]
