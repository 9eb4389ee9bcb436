"""Twenty devices and the heartbeats that they send each hour. The seed determines everything; this module does no I/O,
and the caller reports which heartbeats were written."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import msgspec

from nexhb.heartbeat import DeviceFacts, Heartbeat, Label, bucket_of
from nexhb.postgres.codecs import pack_ip

BUCKET_SECONDS = 10
WINDOW = timedelta(days=7)  # ingest.accept_past: how old a replayed heartbeat may be
_SAFE = WINDOW - timedelta(hours=2)
_RECENT = 3_000  # written heartbeats that may be sent again

# Texts as devices send them. Each of them led to an invalid CSV once.
LABELS = (
    Label("1.0.9", "2.1.0", "wifi", "Store-42"),
    Label("1.0.9", "2.1.0", "cellular", ""),
    Label("1.0.9", "", "wifi", 'a "quoted",\nname'),
    Label("", "", "", ""),
    Label("1.1.0", "2.1.0", "wifi", "Café ☕\u2028 \x85\x0b\x1e"),
    Label("1.1.0", "", "wifi", "\\."),
    Label("1.1.0", "NULL", "wifi", " \t\r'"),
)
_FACTS = DeviceFacts("Store 42", "13", 33, "2025-09-05", "TP1A.220624.014", "SM-T500", "samsung")
_ADDRESSES = ("192.168.1.50", "10.0.0.7", "2001:db8::1", None)


@dataclass
class Device:
    """One kiosk."""

    number: int
    id: str
    silent: tuple[datetime, datetime] | None = None  # the device is switched off and creates no heartbeats
    offline_until: datetime | None = None  # the device creates heartbeats but cannot send them
    queue: list[Heartbeat] = field(default_factory=list)

    def is_silent(self, now: datetime) -> bool:
        """Return whether the device is switched off."""
        return self.silent is not None and self.silent[0] <= now < self.silent[1]


class Fleet:
    """All devices."""

    def __init__(self, devices: list[Device], rng: random.Random) -> None:
        self.devices = devices
        self._rng = rng
        self._recent: deque[Heartbeat] = deque(maxlen=_RECENT)
        self.replayed = self.duplicates = self.late_count = 0

    def hour(self, start: datetime, end: datetime) -> list[Heartbeat]:
        """Return the heartbeats that are sent at `end`, the end of the period that began at `start`."""
        rng, sent = self._rng, list[Heartbeat]()
        for device in self.devices:
            if device.is_silent(start):
                continue
            # An older heartbeat would be stored with its time of receipt (see wire), and so differ from the one sent.
            device.queue = [h for h in device.queue if end - h.ts < WINDOW]
            if device.offline_until is None and rng.random() < 0.01:
                device.offline_until = start + timedelta(hours=rng.choice((3, 12, 40, 100, 160)))
            device.queue.append(self.heartbeat(device, self._between(start, end), end))
            if device.offline_until is None or device.offline_until <= end:
                device.offline_until = None
                self.replayed += len(device.queue) - 1
                sent += device.queue
                device.queue = []
        if rng.random() < 0.25:
            sent += self.late(end, rng.randint(1, 4))
        if self._recent and rng.random() < 0.25:
            sent += self.repeats(end, rng.randint(1, 6))
        rng.shuffle(sent)
        return sent

    def late(self, now: datetime, count: int, day: datetime | None = None) -> list[Heartbeat]:
        """Return new heartbeats that were made at accepted past times, or on the day that begins at `day`."""
        first, last = now - _SAFE, now
        if day is not None:
            first, last = max(first, day), min(last, day + timedelta(days=1) - timedelta(microseconds=1))
        if first >= last:
            return []
        awake = [device for device in self.devices if not device.is_silent(first) and not device.is_silent(now)]
        self.late_count += count
        return [self.heartbeat(self._rng.choice(awake), self._between(first, last), now) for _ in range(count)]

    def repeats(self, now: datetime, count: int) -> list[Heartbeat]:
        """Return duplicates of written heartbeats: the same heartbeat, or another one in the same bucket."""
        rng, sent = self._rng, list[Heartbeat]()
        for _ in range(count):
            old = rng.choice(self._recent)
            if now - old.ts > _SAFE:
                continue
            device = self.devices[old.device_no - 1]
            if rng.random() < 0.3 and not device.is_silent(now):
                start = old.ts - timedelta(seconds=old.ts.second % BUCKET_SECONDS, microseconds=old.ts.microsecond)
                old = self.heartbeat(device, self._between(start, start + timedelta(seconds=BUCKET_SECONDS)), now)
            sent.append(msgspec.structs.replace(old, received_at=now))
        self.duplicates += len(sent)
        return sent

    def remember(self, heartbeat: Heartbeat) -> None:
        """Note that a heartbeat was written."""
        self._recent.append(heartbeat)

    def _between(self, first: datetime, last: datetime) -> datetime:
        micros = (last - first) // timedelta(microseconds=1)
        return first + timedelta(microseconds=self._rng.randrange(max(micros, 1)))

    def heartbeat(self, device: Device, ts: datetime, received_at: datetime) -> Heartbeat:
        """Return one heartbeat with random values."""
        rng = self._rng
        address = rng.choice(_ADDRESSES)
        return Heartbeat(
            device_no=device.number,
            device_id=device.id,
            ts=ts,
            received_at=received_at,
            bucket=bucket_of(ts, BUCKET_SECONDS),
            clock_wrong=rng.random() < 0.02,
            label=rng.choice(LABELS),
            battery_pct=rng.choice((None, rng.randint(0, 100))),
            plugged=rng.choice((None, True, False)),
            temp_c=rng.choice((None, 0.1, 31.5, rng.uniform(-20, 60))),
            ip=pack_ip(address) if address else None,
            signal_dbm=rng.choice((None, rng.randint(-120, 0))),
            uptime_s=rng.choice((None, rng.randrange(2**31))),
            ram_used_mb=rng.choice((None, rng.randint(0, 4096))),
            unity_running=rng.choice((None, True, False)),
            facts=_FACTS,
            claimed_device_id=None,
            queue_depth=None,
            dropped=(),
        )
