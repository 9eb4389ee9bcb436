"""The simulated fleet: devices, their heartbeats, and when these are sent. A seed determines everything; there is no
clock and no socket.

Bodies are written as Gson writes them (docs/wire.md): null fields left out, numbers of battery, system, memory and
network as doubles, timestamps as `Instant.toString()`.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import random
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple, TextIO

import orjson

MICROS: Final = 1_000_000
BUCKET_US: Final = 10 * MICROS
UNITY_PACKAGE: Final = "io.unitynodes.unityapp"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MASK: Final = 0xFFFF_FFFF


# memory in MB, and the object `system` of a body, which has the values of `android.os.Build`
_SYSTEM: Final = ("model", "manufacturer", "android_version", "sdk_int", "build_id", "patch_level")
_MODELS: Final = (
    (2848, ("SM-T500", "samsung", "12", 31.0, "SP1A.210812.016", "2024-03-01")),
    (3661, ("SM-X200", "samsung", "13", 33.0, "TP1A.220624.014", "2025-09-05")),
    (1862, ("SM-T510", "samsung", "11", 30.0, "RP1A.200720.012", "2023-02-01")),
    (3779, ("Lenovo TB-X306F", "LENOVO", "11", 30.0, "RP1A.200720.011", "2022-11-05")),
    (2778, ("KFTRWI", "Amazon", "9", 28.0, "PS7331.4463N", "2024-08-01")),
    (3700, ("moto tab g62", "motorola", "12", 31.0, "S1SUS32.13-41", "2024-12-01")),
    (1987, ("rk3566_kiosk", "rockchip", "11", 30.0, "RQ3A.210705.001", "2021-07-05")),
)
_AGENT_VERSIONS: Final = ("1.0.9", "1.0.9", "1.0.9", "1.0.8", "1.0.5", "1.1.0-beta.2")
_UNITY_VERSIONS: Final = (("2.1.0", 210), ("2.1.0", 210), ("2.0.3", 203), ("1.9.7", 197))
# today's agent writes "cell", and other versions write "cellular"
_TRANSPORTS: Final = ("wifi",) * 14 + ("ethernet", "ethernet", "cell", "cellular")
_SSIDS: Final = ("Store-{0}", "Store-{0}", "Store-{0}-Guest", "Café {0}", "Joe's & Sons {0}", "kiosk=100%")
_CARRIERS: Final = ("T-Mobile", "Vodafone.de", "o2 - de", "AT&T")
_KIOSKS_PER_STORE: Final = 8


class Account(NamedTuple):
    """A device's identity."""

    device_id: str
    alias: str
    token: str


@dataclass(frozen=True, slots=True, repr=False)
class Device:
    """One kiosk: its identity, and everything in its body that does not change between heartbeats."""

    index: int
    device_id: str
    alias: str
    token: str
    # what never changes in the device's bodies: fields, and parts of the objects system and network
    fields: dict[str, Any] = field(compare=False)
    system: Mapping[str, Any] = field(compare=False)
    network: Mapping[str, Any] = field(compare=False)
    ram_mb: int
    has_unity: bool
    # the clock's resolution: 1,000 on old Androids (three digits), 1 on new ones (six or nine)
    resolution_us: int
    # nanoseconds after the microseconds; below 500, so that rounding and truncating give the same microsecond
    nanos: int
    # most kiosks reboot within weeks; some run past 115 days
    reboot_every_s: int
    boot_offset_s: int
    # change of the battery level in percent per two heartbeats; 0: always on mains
    battery_step: int
    # where a body has signal_dbm: 1 in the object network, 2 at the top level, 0 nowhere
    signal_place: int
    salt: int

    def __repr__(self) -> str:
        """Return the device's identity without the token, since this text ends up in logs and tracebacks."""
        return f"Device({self.index}, {self.device_id}, {self.alias!r})"

    def made_us(self, at_us: int) -> int:
        """Return the instant (µs since 1970) as this device's own clock shows it."""
        return at_us - at_us % self.resolution_us


def make_fleet(n: int, seed: int) -> tuple[Device, ...]:
    """Make `n` devices; device i depends only on (seed, i), so a small fleet is the first part of a large one."""
    return tuple(make_device(index, seed) for index in range(n))


def make_device(index: int, seed: int | str, known: Account | None = None) -> Device:
    """Make one device from (seed, index), with the id, alias and token of `known` if given."""
    rng = random.Random(f"nexhb:{seed}:{index}")
    store = index // _KIOSKS_PER_STORE + 1
    device_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    token = base64.urlsafe_b64encode(rng.randbytes(32)).rstrip(b"=").decode()
    account = known or Account(device_id, f"Store {store} - kiosk {index % _KIOSKS_PER_STORE + 1}", token)
    transport, (ram_mb, system) = rng.choice(_TRANSPORTS), rng.choice(_MODELS)
    digits = rng.choice((3, 6, 6, 6, 9))
    unity = rng.choice(_UNITY_VERSIONS) if rng.random() < 0.97 else None
    app: dict[str, Any] = {"installed": False, "version_code": 0}
    if unity is not None:
        app = {"installed": True, "version_name": unity[0], "version_code": unity[1]}
    network = {
        "transport": transport,
        "ssid": rng.choice(_SSIDS).format(store) if transport == "wifi" else None,
        "carrier": rng.choice(_CARRIERS) if transport.startswith("cell") else None,
        "ip": f"192.168.{store % 250}.{index % _KIOSKS_PER_STORE + 50}",
    }
    fields = {
        "device_id": account.device_id,
        "alias": account.alias,
        "app_version": rng.choice(_AGENT_VERSIONS),
        "app_versions": {
            UNITY_PACKAGE: app,
            "org.zwanoo.android.speedtest": {"installed": False, "version_code": 0},
        },
        "speedtest_running_signals": {"has_service_notification": False, "foreground_recent_seconds": -1},
        # as Firebase writes them: 22 characters, a colon, 140 characters
        "fcm_token": f"{rng.randbytes(11).hex()}:APA91b{rng.randbytes(67).hex()}" if rng.random() < 0.6 else None,
        "self_heal_hints": rng.choice((None, None, None, (), ("battery_optimisation_on",))),
        "is_device_owner": True,
        "power_ok": True,
        "doze_whitelisted": True,
        "net_validated": True,
        "queue_depth": 0,
    }
    return Device(
        index,
        *account,
        fields=_without_nulls(fields),
        system=dict(zip(_SYSTEM, system, strict=True)),
        network=_without_nulls(network),
        ram_mb=ram_mb,
        has_unity=unity is not None,
        resolution_us=1000 if digits == 3 else 1,
        nanos=rng.randrange(1, 500) if digits == 9 else 0,
        reboot_every_s=rng.choice((1, 7, 14, 30, 30, 90, 300)) * 86_400,
        boot_offset_s=rng.randrange(300 * 86_400),
        battery_step=rng.choice((0, 0, 1, 1, 2)),
        signal_place=rng.choice((0, 0, 0, 1, 2)) if transport == "wifi" else 0,
        salt=rng.getrandbits(32),
    )


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    # Gson leaves out what is null
    return {name: value for name, value in values.items() if value is not None}


def make_accounts(n: int, seed: int) -> tuple[Account, ...]:
    """Return `n` identities without devices: each takes 3 µs, so that half a million of them are made in seconds."""
    accounts = []
    for index in range(n):
        digest = hashlib.sha512(b"nexhb crowd:%d:%d" % (seed, index)).digest()
        token = base64.urlsafe_b64encode(digest[:32]).rstrip(b"=").decode()
        device_id = str(uuid.UUID(bytes=digest[32:48], version=4))
        accounts.append(Account(device_id, f"Store {index // _KIOSKS_PER_STORE + 1}", token))
    return tuple(accounts)


def write_csv(fleet: Sequence[Device], file: TextIO) -> None:
    """Write device_id,alias,token with a header, as `nexhb devices import` reads it."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Account._fields)
    writer.writerows((device.device_id, device.alias, device.token) for device in fleet)


_GSON_ESCAPES: Final = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&='\u2028\u2029"})
# (seconds since the app was in front, whether it is running): of 16 heartbeats, 12 have the app in front, 2 in the
# background, 1 not running, and in 1 the agent does not know the state
_UNITY: Final = (*((s, True) for s in range(12)), (340, True), (86_400, False), (915, None), (-1, None))


def gson(value: object) -> bytes:
    """Return JSON as Gson writes it: non-ASCII characters unchanged, HTML's special characters escaped, no spaces."""
    return orjson.dumps(value).decode().translate(_GSON_ESCAPES).encode()


@lru_cache(maxsize=8192)
def second_text(second: int) -> bytes:
    """Return a time in seconds since 1970 as `2026-11-24T02:00:00`."""
    return (_EPOCH + timedelta(seconds=second)).isoformat()[:19].encode()


def timestamp(device: Device, made_us: int) -> str:
    """Return the instant as `Instant.toString()` writes it: with as few groups of three fraction digits as needed."""
    second, micros = divmod(made_us, MICROS)
    text = second_text(second).decode()
    if device.nanos:
        return f"{text}.{micros:06d}{device.nanos:03d}Z"
    if micros % 1000:
        return f"{text}.{micros:06d}Z"
    return f"{text}.{micros // 1000:03d}Z" if micros else f"{text}Z"


def body_us(device: Device, made_us: int, beat_no: int) -> bytes:
    """Return the heartbeat that a device made at `made_us` (µs since 1970); the heartbeat's number `beat_no` determines
    battery, signal etc."""
    mixed = (beat_no * 0x9E37_79B1 ^ device.salt) & _MASK
    available_mb = device.ram_mb * (18 + (mixed >> 20) % 37) // 100
    # the level falls from 100 to 20 while discharging, then rises from 20 to 100 while charging
    wave = (beat_no * device.battery_step // 2 + device.salt) % 160 if device.battery_step else 160
    signal = {"signal_dbm": -38.0 - ((mixed >> 12) & 31)}
    in_front_s, running = _UNITY[(mixed >> 28) & 15] if device.has_unity else (-1, False)
    uptime_s = (made_us // MICROS + device.boot_offset_s) % device.reboot_every_s
    fields = device.fields | {
        "timestamp_utc": timestamp(device, made_us),
        "battery": {
            "pct": float(100 - wave if wave < 80 else wave - 60),
            "charging": wave >= 80,
            "temperature_c": (268 + ((mixed >> 8) & 63)) / 10,
        },
        "system": {"uptime_seconds": float(uptime_s), **device.system},
        "memory": {
            "total_ram_mb": float(device.ram_mb),
            "avail_ram_mb": float(available_mb),
            "pressure_pct": float((device.ram_mb - available_mb) * 100 // device.ram_mb),
        },
        "network": {**device.network, **(signal if device.signal_place == 1 else {})},
        "monitored_foreground_recent_s": in_front_s,
        **({} if running is None else {"unity_process_running": running}),
        **(signal if device.signal_place == 2 else {}),
    }
    return gson(fields)


@dataclass(frozen=True, slots=True)
class Replay:
    """A device that was offline: the time of its return and its queue, oldest first, in µs from the start."""

    device: int
    start_us: int
    made_us: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Intended sends, sorted by time, in µs from the start, which is a bucket's first instant.

    A heartbeat is made when it is due: `offset_us` is its timestamp too, counted from the same start.
    """

    duration_s: float
    offset_us: array[int]
    device: array[int]

    def __len__(self) -> int:
        """Return how many sends are scheduled."""
        return len(self.offset_us)


def schedule(
    n: int, interval_s: float, jitter_s: float, duration_s: float, seed: int, *, duplicate_factor: float = 1.0
) -> Schedule:
    """Schedule `n` devices, each with a phase of its own, every `interval_s` ± `jitter_s` for `duration_s`.

    Each heartbeat is sent `duplicate_factor` times on average, with timestamps spread over its own bucket.
    """
    if interval_s <= 0 or duration_s <= 0 or jitter_s < 0 or duplicate_factor < 1:
        raise ValueError("interval and duration > 0, jitter >= 0, duplicate factor >= 1")
    rng = random.Random(f"nexhb schedule:{seed}")
    interval_us, jitter_us = round(interval_s * MICROS), round(jitter_s * MICROS)
    end_us = round(duration_s * MICROS)
    sends: list[tuple[int, int]] = []
    phases = [rng.randrange(interval_us) for _ in range(n)]
    # jitter may move heartbeats from before the start or after the end into the run
    margin = jitter_us // interval_us + 1
    for device, phase in enumerate(phases):
        for beat in range(-margin, (end_us + jitter_us) // interval_us + 1):
            due = phase + beat * interval_us + (rng.randint(-jitter_us, jitter_us) if jitter_us else 0)
            if 0 <= due < end_us:
                sends.extend((at, device) for at in _copies(due, end_us, duplicate_factor, rng))
    sends.sort()
    return Schedule(duration_s, array("q", [at for at, _ in sends]), array("i", [device for _, device in sends]))


def _copies(due_us: int, end_us: int, factor: float, rng: random.Random) -> list[int]:
    """Return the times at which one heartbeat is sent: its due time, or several times in its bucket."""
    copies = int(factor) + (rng.random() < factor - int(factor))
    if copies == 1:
        return [due_us]
    first = due_us - due_us % BUCKET_US
    room = min(BUCKET_US, end_us - first)
    # one copy in each of several equal parts: no two copies have the same timestamp
    return [first + room * i // copies + rng.randrange(max(1, room // copies)) for i in range(copies)]


def replays(devices: int, interval_s: float, queue: int, within_s: float, seed: int) -> tuple[Replay, ...]:
    """Return devices that come back within `within_s`, each with a queue of old heartbeats, one per interval."""
    rng = random.Random(f"nexhb replays:{seed}")
    interval_us, within_us, queues = round(interval_s * MICROS), round(within_s * MICROS), []
    for device in range(devices):
        phase_us = rng.randrange(interval_us)
        made_us = tuple(phase_us - age * interval_us for age in range(queue, 0, -1))
        queues.append(Replay(device, rng.randrange(max(1, within_us)), made_us))
    return tuple(queues)
