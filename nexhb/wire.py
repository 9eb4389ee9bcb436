"""What a device sends → a Heartbeat, or the fields that are wrong. Pure: the clock is an argument.

The shape is the NexMDM agent's. Its JSON writer omits nulls and turns every number of battery, system, memory
and network into a double, so any field may be absent and an integral double is an integer. Fields that nexhb does
not need are not looked at, whatever they hold.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, NamedTuple, TypeVar

import msgspec

BUCKET_EPOCH = 1_577_836_800  # 2020-01-01T00:00:00Z: buckets count from here, so that int4 lasts until 2088

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


class Label(NamedTuple):
    """The texts that most heartbeats share, stored once; empty where unknown."""

    agent_version: str
    unity_pkg_version: str
    network_type: str
    ssid: str


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


class Rules(NamedTuple):
    """What the configuration says of heartbeats."""

    unity_package: str
    bucket_seconds: int
    accept_past: timedelta
    accept_future: timedelta


# ---- the shape ------------------------------------------------------------------------------------------------

_Text32 = Annotated[str, msgspec.Meta(max_length=32)]
_Text50 = Annotated[str, msgspec.Meta(max_length=50)]
_Text100 = Annotated[str, msgspec.Meta(max_length=100)]
_Text200 = Annotated[str, msgspec.Meta(max_length=200)]
_Number = float | None
_Zoned = Annotated[datetime, msgspec.Meta(tz=True)]


class _Battery(msgspec.Struct, gc=False):
    pct: _Number = None
    charging: bool | None = None
    temperature_c: _Number = None


class _System(msgspec.Struct, gc=False):
    uptime_seconds: _Number = None
    android_version: _Text50 | None = None
    sdk_int: _Number = None
    patch_level: _Text50 | None = None
    build_id: _Text100 | None = None
    model: _Text100 | None = None
    manufacturer: _Text100 | None = None


class _Memory(msgspec.Struct, gc=False):
    total_ram_mb: _Number = None
    avail_ram_mb: _Number = None


class _Network(msgspec.Struct, gc=False):
    transport: _Text32 | None = None
    ssid: _Text100 | None = None
    ip: _Text100 | None = None
    signal_dbm: _Number = None


class _App(msgspec.Struct, gc=False):
    installed: bool | None = None
    version_name: _Text100 | None = None


class _Body(msgspec.Struct, gc=False):
    timestamp_utc: _Zoned
    device_id: msgspec.Raw = msgspec.Raw()  # the token says who it is: whatever stands here is no reason to refuse
    alias: _Text200 | None = None
    app_version: _Text50 | None = None
    app_versions: dict[str, msgspec.Raw] | None = None
    battery: _Battery | None = None
    system: _System | None = None
    memory: _Memory | None = None
    network: _Network | None = None
    signal_dbm: _Number = None
    unity_process_running: bool | None = None
    monitored_foreground_recent_s: _Number = None
    queue_depth: msgspec.Raw = msgspec.Raw()


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_app = msgspec.json.Decoder(_App | None).decode
_decode_anything = msgspec.json.Decoder().decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NO_BATTERY, _NO_SYSTEM, _NO_MEMORY, _NO_NETWORK = _Battery(), _System(), _Memory(), _Network()


def split(body: bytes, *, most: int) -> list[bytes]:
    """A replayed queue: a JSON array, or one heartbeat a line (NDJSON). Which it is, its first character says: a
    client that names the wrong type, or none, must not find its queue refused and deleted. At most `most` of them;
    blank lines do not count.

    Raises Refused where it is neither, or too long.
    """
    ndjson = not body.lstrip().startswith(b"[")
    items = body.split(b"\n") if ndjson else _decode(_decode_items, body)
    found = [bytes(item) for item in items if not ndjson or item.strip()]
    if len(found) > most:
        raise Refused([FieldError("", f"at most {most} heartbeats in one request, these are {len(found)}")], 413)
    return found


# ---- body → Heartbeat -----------------------------------------------------------------------------------------


def parse(body: bytes, *, device_no: int, device_id: str, received_at: datetime, rules: Rules) -> Heartbeat:
    """One heartbeat of the device that the token names. Raises Refused, naming each bad field."""
    raw = _decode(_decode_body, body)
    errors: list[FieldError] = []
    system = raw.system or _NO_SYSTEM
    battery = raw.battery or _NO_BATTERY
    network = raw.network or _NO_NETWORK
    memory = raw.memory or _NO_MEMORY
    unity_version, unity_running = _unity(raw, rules.unity_package, errors)
    signal = raw.signal_dbm if raw.signal_dbm is not None else network.signal_dbm
    total = _integer(memory.total_ram_mb, "memory.total_ram_mb", 0, INT32_MAX, errors)
    available = _integer(memory.avail_ram_mb, "memory.avail_ram_mb", 0, INT32_MAX, errors)
    ip = pack_ip(network.ip) if network.ip else None
    ts, clock_wrong = _made_at(raw.timestamp_utc, received_at, rules)
    heartbeat = Heartbeat(
        device_no=device_no,
        device_id=device_id,
        ts=ts,
        received_at=received_at,
        bucket=bucket_of(ts, rules.bucket_seconds),
        clock_wrong=clock_wrong,
        label=Label(
            _text(raw.app_version, "app_version", errors) or "",
            unity_version or "",
            _text(network.transport, "network.transport", errors) or "",
            _text(network.ssid, "network.ssid", errors) or "",
        ),
        battery_pct=_integer(battery.pct, "battery.pct", 0, 100, errors),
        plugged=battery.charging,
        temp_c=_real(battery.temperature_c, "battery.temperature_c", errors),
        ip=ip,
        signal_dbm=_integer(signal, "signal_dbm", -INT16_MAX - 1, INT16_MAX, errors),
        uptime_s=_integer(system.uptime_seconds, "system.uptime_seconds", 0, INT32_MAX, errors),
        ram_used_mb=max(total - available, 0) if total is not None and available is not None else None,
        unity_running=unity_running,
        facts=DeviceFacts(
            _text(raw.alias, "alias", errors),
            _text(system.android_version, "system.android_version", errors),
            _integer(system.sdk_int, "system.sdk_int", 0, INT32_MAX, errors),
            _text(system.patch_level, "system.patch_level", errors),
            _text(system.build_id, "system.build_id", errors),
            _text(system.model, "system.model", errors),
            _text(system.manufacturer, "system.manufacturer", errors),
        ),
        claimed_device_id=_claimed(raw.device_id, device_id) if raw.device_id else None,
        queue_depth=_queue_depth(raw.queue_depth) if raw.queue_depth else None,
        dropped=("network.ip",) if network.ip and ip is None else (),
    )
    if errors:
        raise Refused(errors)
    return heartbeat


def _decode(decoder: Callable[[bytes], T], body: bytes) -> T:
    try:
        return decoder(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Half a character (`\ud83d` alone) is refused by the decoder wherever it stands, also in a field that nobody
        # needs. As U+0000 it is refused only where it would be stored, and by that field's name.
        whole = _ESCAPE.sub(_no_half, body) if b"\\u" in body else body
        if whole == body:
            raise _refused_json(error, body) from None
    return _decode(decoder, whole)


_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\\.", re.DOTALL
)


def _no_half(escape: re.Match[bytes]) -> bytes:
    return rb"\u0000" if len(escape[0]) == 6 else escape[0]


def bucket_of(ts: datetime, bucket_seconds: int) -> int:
    """Start of the bucket that `ts` lies in, in seconds since BUCKET_EPOCH."""
    seconds = math.floor(ts.timestamp()) - BUCKET_EPOCH
    return seconds - seconds % bucket_seconds


def _made_at(claimed: datetime, received_at: datetime, rules: Rules) -> tuple[datetime, bool]:
    """A clock outside the accept window loses no heartbeat and harms no partition: the time of receipt counts."""
    try:
        ts = claimed if claimed.tzinfo is UTC else claimed.astimezone(UTC)
    except OverflowError:  # year 1 or 9999 with an offset
        return received_at, True
    if received_at - rules.accept_past <= ts <= received_at + rules.accept_future:
        return ts, False
    return received_at, True


def _unity(raw: _Body, package: str, errors: list[FieldError]) -> tuple[str | None, bool | None]:
    """Version and state of the Unity app, as wire.md rules: not installed → unknown; the process says; else how
    long ago it was in the foreground, 600 s being the limit."""
    version: str | None = None
    if raw.app_versions and (found := raw.app_versions.get(package)):
        path = f"app_versions.{package}"
        try:
            app = _decode_app(found)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            errors.extend(FieldError(_join(path, e.path), e.message) for e in _refused_json(error, bytes(found)).errors)
            return None, None
        if app is None or app.installed is False:
            return None, None
        version = _text(app.version_name, f"{path}.version_name", errors)
    elif raw.app_versions is not None:
        return None, None  # the map is there and does not name it: not installed
    if raw.unity_process_running is not None:
        return version, raw.unity_process_running
    recent = _integer(raw.monitored_foreground_recent_s, "monitored_foreground_recent_s", -INT32_MAX, INT32_MAX, errors)
    return version, recent < 600 if recent is not None and recent >= 0 else None


def _integer(value: float | None, path: str, low: int, high: int, errors: list[FieldError]) -> int | None:
    if value is None:
        return None
    number = round(value)
    if low <= number <= high:
        return number
    errors.append(FieldError(path, f"takes {low} to {high}, not {value:.12g}"))
    return None


def _real(value: float | None, path: str, errors: list[FieldError]) -> float | None:
    if value is None or -_FLOAT32_MAX < value < _FLOAT32_MAX:
        return value
    errors.append(FieldError(path, f"is out of range: {value:.12g}"))
    return None


def _text(value: str | None, path: str, errors: list[FieldError]) -> str | None:
    if not value:
        return None
    if "\0" in value:
        errors.append(FieldError(path, "holds a character that cannot be stored: U+0000, or half of one"))
        return None
    return value


def _claimed(raw: msgspec.Raw, device_id: str) -> str | None:
    """The device_id in the body where it is another than the token's, cut to 100 characters."""
    try:
        claimed = _decode_anything(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "unreadable"
    return None if claimed is None or claimed == device_id else str(claimed)[:100]


def _queue_depth(raw: msgspec.Raw) -> int | None:
    try:
        value = _decode_anything(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return round(value) if isinstance(value, int | float) and 0 <= value <= INT32_MAX else None


@lru_cache(maxsize=16_384)  # a fleet's addresses repeat with every heartbeat; parsing one costs 2 µs, a hit 0.1
def pack_ip(text: str) -> bytes | None:
    """An address in PostgreSQL's binary form of inet, or None where it is not one. A zone (`%wlan0`) is dropped."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0].strip())
    except ValueError:
        return None
    family, bits = (2, 32) if address.version == 4 else (3, 128)
    return bytes((family, bits, 0, bits // 8)) + address.packed


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
