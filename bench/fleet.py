"""The simulated fleet: devices, their heartbeats, and when each is due. Pure and seeded: no clock, no socket.

Bodies are written as Gson writes them (docs/wire.md): null fields left out, numbers of battery, system,
memory and network as Java doubles, timestamps as `Instant.toString()`. A device's body is one bytes template,
so that a heartbeat costs one formatting call.
"""

from __future__ import annotations

import base64
import csv
import json
import random
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple, TextIO

MICROS: Final = 1_000_000
BUCKET_US: Final = 10 * MICROS
UNITY_PACKAGE: Final = "io.unitynodes.unityapp"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MASK: Final = 0xFFFF_FFFF


class Model(NamedTuple):
    """A kiosk model as `android.os.Build` names it."""

    name: str
    manufacturer: str
    android: str
    sdk: int
    build_id: str
    patch_level: str
    ram_mb: int


_MODELS: Final = (
    Model("SM-T500", "samsung", "12", 31, "SP1A.210812.016", "2024-03-01", 2848),
    Model("SM-X200", "samsung", "13", 33, "TP1A.220624.014", "2025-09-05", 3661),
    Model("SM-T510", "samsung", "11", 30, "RP1A.200720.012", "2023-02-01", 1862),
    Model("Lenovo TB-X306F", "LENOVO", "11", 30, "RP1A.200720.011", "2022-11-05", 3779),
    Model("TB300FU", "LENOVO", "13", 33, "TP1A.220624.014", "2025-06-05", 3800),
    Model("KFTRWI", "Amazon", "9", 28, "PS7331.4463N", "2024-08-01", 2778),
    Model("moto tab g62", "motorola", "12", 31, "S1SUS32.13-41", "2024-12-01", 3700),
    Model("rk3566_kiosk", "rockchip", "11", 30, "RQ3A.210705.001", "2021-07-05", 1987),
)
_AGENT_VERSIONS: Final = ("1.0.9", "1.0.9", "1.0.9", "1.0.8", "1.0.5", "1.1.0-beta.2")
_UNITY_VERSIONS: Final = (("2.1.0", 210), ("2.1.0", 210), ("2.0.3", 203), ("1.9.7", 197))
# the agent itself writes "cell"; older and newer ones write the rest
_TRANSPORTS: Final = ("wifi",) * 14 + ("ethernet", "ethernet", "cell", "cellular")
_SSIDS: Final = ("Store-{0}", "Store-{0}", "Store-{0}-Guest", "Café {0}", "Joe's & Sons {0}", "kiosk=100%")
_CARRIERS: Final = ("T-Mobile", "Vodafone.de", "o2 - de", "AT&T")
_KIOSKS_PER_STORE: Final = 8


@dataclass(frozen=True, slots=True, repr=False)
class Device:
    """One kiosk: who it is, and everything of its body that does not change from beat to beat."""

    index: int
    device_id: str
    alias: str
    token: str
    model: Model
    agent_version: str
    unity_version: str | None
    transport: str
    ssid: str | None
    ip: str
    # the clock's resolution: 1,000 on old Androids (three digits), 1 on new ones (six or nine)
    resolution_us: int
    # what follows the microseconds; below 500, so that rounding and truncating give the same microsecond
    nanos: int
    reboot_every_s: int
    boot_offset_s: int
    battery_step: int
    signal_place: int
    salt: int
    template: bytes

    def __repr__(self) -> str:
        """Who it is, without the token: this lands in logs and tracebacks."""
        return f"Device({self.index}, {self.device_id}, {self.alias!r})"

    def made_us(self, at_us: int) -> int:
        """The instant (µs since 1970) as this device's own clock shows it."""
        return at_us - at_us % self.resolution_us


# ── devices ───────────────────────────────────────────────────────────────────────────────────────


def make_fleet(n: int, seed: int) -> tuple[Device, ...]:
    """Make `n` devices; device i depends on (seed, i) only, so a small fleet is the head of a large one."""
    return tuple(_device(index, seed) for index in range(n))


def known_device(index: int, seed: str, known: tuple[str, str, str]) -> Device:
    """One device whose id, alias and token are given; the rest comes from (seed, index)."""
    return _device(index, seed, known)


def _device(index: int, seed: int | str, known: tuple[str, str, str] | None = None) -> Device:
    """Make one device; `known` (id, alias, token) stands in for what the seed would give."""
    rng = random.Random(f"nexhb:{seed}:{index}")
    store = index // _KIOSKS_PER_STORE + 1
    device_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    token = base64.urlsafe_b64encode(rng.randbytes(32)).rstrip(b"=").decode()
    alias = f"Store {store} - kiosk {index % _KIOSKS_PER_STORE + 1}"
    if known is not None:
        device_id, alias, token = known
    transport = rng.choice(_TRANSPORTS)
    digits = rng.choice((3, 6, 6, 6, 9))
    unity = rng.choice(_UNITY_VERSIONS) if rng.random() < 0.97 else None
    salt = rng.getrandbits(32)
    traits = _Traits(
        device_id=device_id,
        alias=alias,
        agent_version=rng.choice(_AGENT_VERSIONS),
        unity=unity,
        model=rng.choice(_MODELS),
        transport=transport,
        ssid=rng.choice(_SSIDS).format(store) if transport == "wifi" else None,
        carrier=rng.choice(_CARRIERS) if transport.startswith("cell") else None,
        ip=f"192.168.{store % 250}.{index % _KIOSKS_PER_STORE + 50}",
        fcm_token=_fcm_token(rng) if rng.random() < 0.6 else None,
        hints=rng.choice((None, None, None, (), ("battery_optimisation_on",))),
    )
    return Device(
        index=index,
        device_id=device_id,
        alias=alias,
        token=token,
        model=traits.model,
        agent_version=traits.agent_version,
        unity_version=unity[0] if unity else None,
        transport=transport,
        ssid=traits.ssid,
        ip=traits.ip,
        resolution_us=1000 if digits == 3 else 1,
        nanos=rng.randrange(1, 500) if digits == 9 else 0,
        # most kiosks reboot within weeks; some run past 115 days, where the double turns to 1.2345678E7
        reboot_every_s=rng.choice((1, 7, 14, 30, 30, 90, 300)) * 86_400,
        boot_offset_s=rng.randrange(300 * 86_400),
        # one percent in two beats, or on mains for ever
        battery_step=rng.choice((0, 0, 1, 1, 2)),
        signal_place=rng.choice((0, 0, 0, 1, 2)) if transport == "wifi" else 0,
        salt=salt,
        template=_template(traits),
    )


def _fcm_token(rng: random.Random) -> str:
    """A push token in the form of Firebase's: 22 characters, a colon, 140 characters."""
    return f"{rng.randbytes(11).hex()}:APA91b{rng.randbytes(67).hex()}"


def write_csv(fleet: Sequence[Device], file: TextIO) -> None:
    """Write device_id,alias,token with a header: what `nexhb devices import` takes."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("device_id", "alias", "token"))
    writer.writerows((device.device_id, device.alias, device.token) for device in fleet)


def read_csv(file: TextIO, seed: int) -> tuple[Device, ...]:
    """Read device_id,alias,token; everything else of the devices comes from the seed."""
    rows = csv.DictReader(file)
    missing = {"device_id", "alias", "token"} - set(rows.fieldnames or ())
    if missing:
        raise ValueError(f"the file has no column {', '.join(sorted(missing))}")
    return tuple(_device(index, seed, (row["device_id"], row["alias"], row["token"])) for index, row in enumerate(rows))


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Traits:
    """What goes into a template: the part of the body that a device keeps."""

    device_id: str
    alias: str
    agent_version: str
    unity: tuple[str, int] | None
    model: Model
    transport: str
    ssid: str | None
    carrier: str | None
    ip: str
    fcm_token: str | None
    hints: tuple[str, ...] | None


_GSON_ESCAPES: Final = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&='\u2028\u2029"})


def gson(value: object) -> str:
    """JSON as Gson writes it: non-ASCII as it is, HTML's characters escaped, no spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_GSON_ESCAPES)


def java_double(value: int) -> str:
    """A whole number of 0 or more as `Double.toString` writes it: 87.0, from ten million up 1.2345678E7."""
    digits = str(value)
    if value < 10_000_000:
        return digits + ".0"
    return f"{digits[0]}.{digits[1:].rstrip('0') or '0'}E{len(digits) - 1}"


def _template(traits: _Traits) -> bytes:
    """The body with bytes-format places, in this order: see the arguments in `body_us`."""

    def text(value: object) -> str:
        return gson(value).replace("%", "%%")

    model, parts = traits.model, []
    unity = (
        f'{{"installed":true,"version_name":{text(traits.unity[0])},"version_code":{traits.unity[1]}}}'
        if traits.unity
        else '{"installed":false,"version_code":0}'
    )
    parts.append(f'{{"device_id":{text(traits.device_id)},"alias":{text(traits.alias)}')
    parts.append(f',"app_version":{text(traits.agent_version)},"timestamp_utc":"%b","app_versions":')
    parts.append(f'{{"{UNITY_PACKAGE}":{unity},"org.zwanoo.android.speedtest":')
    parts.append('{"installed":false,"version_code":0}},"speedtest_running_signals":')
    parts.append('{"has_service_notification":false,"foreground_recent_seconds":-1},"battery":{%b}')
    parts.append(f',"system":{{"uptime_seconds":%b,"android_version":{text(model.android)}')
    parts.append(f',"sdk_int":{model.sdk}.0,"patch_level":{text(model.patch_level)}')
    parts.append(f',"build_id":{text(model.build_id)},"model":{text(model.name)}')
    parts.append(f',"manufacturer":{text(model.manufacturer)}}},"memory":{{"total_ram_mb":{model.ram_mb}.0')
    parts.append(',"avail_ram_mb":%d.0,"pressure_pct":%d.0},"network":')
    parts.append(f'{{"transport":{text(traits.transport)}')
    parts.extend(f',"{key}":{text(value)}' for key, value in _present(ssid=traits.ssid, carrier=traits.carrier))
    parts.append(f',"ip":{text(traits.ip)}%b}}')
    hints = None if traits.hints is None else list(traits.hints)
    parts.extend(
        f',"{key}":{text(value)}' for key, value in _present(fcm_token=traits.fcm_token, self_heal_hints=hints)
    )
    parts.append(',"is_device_owner":true,"power_ok":true,"doze_whitelisted":true,"net_validated":true')
    parts.append(',"queue_depth":%d%b}')
    return "".join(parts).encode()


def _present(**fields: object) -> list[tuple[str, object]]:
    """The fields that are not null: Gson leaves the others out."""
    return [(key, value) for key, value in fields.items() if value is not None]


def _battery(wave: int) -> str:
    """The battery's level at a step of its cycle: 100 down to 20 discharging, 20 up to 100 charging."""
    pct, charging = (100 - wave, "false") if wave < 80 else (wave - 60, "true")
    return f'"pct":{pct}.0,"charging":{charging},"temperature_c":'


# index: cycle step 0..160, then tenths of a degree; 160 is full and on mains
_BATTERIES: Final = tuple(_battery(wave).encode() for wave in range(161))
_TEMPERATURES: Final = tuple(f"{t // 10}.{t % 10}".encode() for t in range(268, 332))
_SIGNALS: Final = tuple(f',"signal_dbm":{-dbm}.0'.encode() for dbm in range(38, 70))
_SIGNALS_TOP: Final = tuple(f',"signal_dbm":{-dbm}'.encode() for dbm in range(38, 70))
# of 16 beats: 12 with the app in front, 2 in the background, 1 where it died, 1 where the agent cannot tell
_UNITY: Final = (
    *(f',"monitored_foreground_recent_s":{s},"unity_process_running":true'.encode() for s in range(12)),
    b',"monitored_foreground_recent_s":340,"unity_process_running":true',
    b',"monitored_foreground_recent_s":86400,"unity_process_running":false',
    b',"monitored_foreground_recent_s":915',
    b',"monitored_foreground_recent_s":-1',
)
_NO_UNITY: Final = b',"monitored_foreground_recent_s":-1,"unity_process_running":false'


@lru_cache(maxsize=8192)
def second_text(second: int) -> bytes:
    """`2026-11-24T02:00:00` of a second since 1970."""
    return (_EPOCH + timedelta(seconds=second)).isoformat()[:19].encode()


def timestamp(device: Device, made_us: int) -> bytes:
    """The instant as `Instant.toString()` writes it: as few groups of three digits as hold it."""
    second, micros = divmod(made_us, MICROS)
    if device.nanos:
        return b"%b.%06d%03dZ" % (second_text(second), micros, device.nanos)
    if micros % 1000:
        return b"%b.%06dZ" % (second_text(second), micros)
    if micros:
        return b"%b.%03dZ" % (second_text(second), micros // 1000)
    return second_text(second) + b"Z"


def body_us(device: Device, made_us: int, beat_no: int, queue_depth: int = 0) -> bytes:
    """The heartbeat that `device` made at `made_us` (µs since 1970, in its own resolution)."""
    mixed = (beat_no * 0x9E37_79B1 ^ device.salt) & _MASK
    ram = device.model.ram_mb
    available = ram * (18 + (mixed >> 20) % 37) // 100
    wave = (beat_no * device.battery_step // 2 + device.salt) % 160 if device.battery_step else 160
    uptime = (made_us // MICROS + device.boot_offset_s) % device.reboot_every_s
    signal = (mixed >> 12) & 31
    tail = _NO_UNITY if device.unity_version is None else _UNITY[(mixed >> 28) & 15]
    if device.signal_place == 2:
        tail += _SIGNALS_TOP[signal]
    return device.template % (
        timestamp(device, made_us),
        _BATTERIES[wave] + _TEMPERATURES[(mixed >> 8) & 63],
        b"%d.0" % uptime if uptime < 10_000_000 else java_double(uptime).encode(),
        available,
        (ram - available) * 100 // ram,
        _SIGNALS[signal] if device.signal_place == 1 else b"",
        queue_depth,
        tail,
    )


def body(device: Device, made_at: datetime, beat_no: int) -> bytes:
    """The heartbeat `device` made at `made_at` (aware); `beat_no` decides battery, signal and so on."""
    return body_us(device, device.made_us((made_at - _EPOCH) // _MICROSECOND), beat_no)


# ── when ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Replay:
    """A device that was away: when it is back, and its queue, oldest first, in µs from the start."""

    device: int
    start_us: int
    made_us: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Intended sends, sorted by time, in µs from the start, which is taken as a bucket's first instant.

    A heartbeat is made when it is due: `offset_us` is its timestamp too, counted from the same start.
    """

    duration_s: float
    offset_us: array[int]
    device: array[int]
    beat_no: array[int]
    replays: tuple[Replay, ...] = ()

    def __len__(self) -> int:
        """How many sends are scheduled, replayed queues not counted."""
        return len(self.offset_us)

    def head(self, sends: int, duration_s: float) -> Schedule:
        """The first so many sends, which took so long."""
        return replace(
            self,
            duration_s=duration_s,
            offset_us=self.offset_us[:sends],
            device=self.device[:sends],
            beat_no=self.beat_no[:sends],
        )

    def distinct_buckets(self) -> int:
        """How many rows a server must keep of it: one per device and bucket, queues not counted."""
        pairs = zip(self.device, self.offset_us, strict=True)
        return len({(device, offset // BUCKET_US) for device, offset in pairs})


def schedule(
    n: int,
    interval_s: float,
    jitter_s: float,
    duration_s: float,
    seed: int,
    *,
    duplicate_factor: float = 1.0,
    replay_fraction: float = 0.0,
    replay_queue: int = 30,
) -> Schedule:
    """Schedule `n` devices, each with a phase of its own, every `interval_s` ± `jitter_s` for `duration_s`.

    Each heartbeat is sent `duplicate_factor` times on average, with timestamps spread over its own bucket.
    `replay_fraction` of the devices come back within the first second with `replay_queue` old heartbeats.
    """
    if interval_s <= 0 or duration_s <= 0 or jitter_s < 0 or duplicate_factor < 1 or not 0 <= replay_fraction <= 1:
        raise ValueError("interval and duration > 0, jitter >= 0, duplicate factor >= 1, replay fraction 0..1")
    rng = random.Random(f"nexhb schedule:{seed}")
    interval_us, jitter_us = round(interval_s * MICROS), round(jitter_s * MICROS)
    end_us = round(duration_s * MICROS)
    sends: list[tuple[int, int, int]] = []
    phases = [rng.randrange(interval_us) for _ in range(n)]
    # beats from before the start and after the end may be moved into the run by their jitter
    margin = jitter_us // interval_us + 1
    for device, phase in enumerate(phases):
        for beat in range(-margin, (end_us + jitter_us) // interval_us + 1):
            due = phase + beat * interval_us + (rng.randint(-jitter_us, jitter_us) if jitter_us else 0)
            if 0 <= due < end_us:
                sends.extend((at, device, beat) for at in _copies(due, end_us, duplicate_factor, rng))
    sends.sort()
    returning = sorted(rng.sample(range(n), round(n * replay_fraction)))
    return Schedule(
        duration_s=duration_s,
        offset_us=array("q", [at for at, _, _ in sends]),
        device=array("i", [device for _, device, _ in sends]),
        beat_no=array("i", [beat for _, _, beat in sends]),
        replays=tuple(
            _replay(
                rng,
                device=d,
                phase_us=phases[d],
                interval_us=interval_us,
                queue=replay_queue,
                within_us=MICROS,
            )
            for d in returning
        ),
    )


def _copies(due_us: int, end_us: int, factor: float, rng: random.Random) -> list[int]:
    """When one heartbeat is sent: at its time, or as several copies spread over its bucket."""
    copies = int(factor) + (rng.random() < factor - int(factor))
    if copies == 1:
        return [due_us]
    first = due_us - due_us % BUCKET_US
    room = min(BUCKET_US, end_us - first)
    # one copy in each of equal stretches: never twice the same timestamp
    return [first + room * i // copies + rng.randrange(max(1, room // copies)) for i in range(copies)]


def replays(n: int, interval_s: float, queue: int, within_s: float, seed: int) -> tuple[Replay, ...]:
    """All `n` devices back within `within_s`, each with `queue` old heartbeats, one per interval."""
    rng = random.Random(f"nexhb replays:{seed}")
    interval_us, within_us = round(interval_s * MICROS), round(within_s * MICROS)
    return tuple(
        _replay(
            rng,
            device=device,
            phase_us=rng.randrange(interval_us),
            interval_us=interval_us,
            queue=queue,
            within_us=within_us,
        )
        for device in range(n)
    )


def _replay(rng: random.Random, *, device: int, phase_us: int, interval_us: int, queue: int, within_us: int) -> Replay:
    """One device's queue, oldest first; the last one is made just before the start."""
    made = tuple(phase_us - age * interval_us for age in range(queue, 0, -1))
    return Replay(device=device, start_us=rng.randrange(max(1, within_us)), made_us=made)
