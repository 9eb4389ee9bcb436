"""The requests of a load, by number. Each is a heartbeat of a device, or a queue of heartbeats, made at its own
time."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, Literal

from bench.fleet import BUCKET_US, MICROS, Account, Device, Schedule, body_us, make_device, second_text
from bench.load.sender import Target
from bench.report import SendLog

_DAY_S: Final = 86_400
_BUCKET_S: Final = BUCKET_US // MICROS
# one day less than the default limit of age: a device whose heartbeat is older counts as having a wrong clock
_OLDEST_BUCKETS: Final = 6 * _DAY_S // _BUCKET_S
_KIOSKS_PER_STORE: Final = 8
_TEMPLATES: Final = 512
# the number of a shop ("store") that is spliced in has five digits, so that a body is as long as its template
_STORE: Final = 99_999
# the number of heartbeats that an agent keeps
QUEUE: Final = 500
Form = Literal["array", "ndjson"]
_MEDIA: Final = {"array": "application/json", "ndjson": "application/x-ndjson"}


def bucket_start_s(now_s: float | None = None) -> int:
    """Return the start of a moment's bucket, by default of the current one, in seconds since 1970."""
    return int(time.time() if now_s is None else now_s) // _BUCKET_S * _BUCKET_S


class Keys:
    """Buckets for one database, handed out in parts. Each part is newer than the one before, since a device's
    heartbeats only get newer. A part is a range of the buckets' starts, in seconds since 1970."""

    def __init__(self, requests: int, devices: int, now_s: float | None = None) -> None:
        """Hold the newest buckets for this many requests, one per device and bucket.

        If possible, the buckets are all in one UTC day, as those of a live fleet: if they would begin before midnight,
        they also end before midnight.
        """
        self._devices = devices
        end_s = bucket_start_s(now_s)
        seconds = max(1, min(math.ceil(requests / devices), _OLDEST_BUCKETS)) * _BUCKET_S
        midnight_s = end_s - end_s % _DAY_S
        if end_s - seconds < midnight_s and seconds <= _DAY_S:
            end_s = midnight_s
        self.rest = range(end_s - seconds, end_s, _BUCKET_S)

    def holding(self, requests: int) -> range:
        """Return the next buckets that hold `requests` requests."""
        return self.buckets(math.ceil(requests / self._devices))

    def buckets(self, number: int) -> range:
        """Return the next `number` buckets."""
        if number > len(self.rest):
            raise ValueError(f"{number} buckets requested, {len(self.rest)} left")
        head, self.rest = self.rest[:number], self.rest[number:]
        return head


class Scheduled:
    """The heartbeats of a schedule, each made when it is sent."""

    def __init__(self, to: Target, fleet: Sequence[Device], plan: Schedule) -> None:
        self._heads = [to.head(device.token) for device in fleet]
        self._fleet = fleet
        self._plan = plan
        self._base_us = bucket_start_s() * MICROS
        self.devices = len(fleet)

    def __len__(self) -> int:
        return len(self._plan)

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Return the device, the timestamp (µs since 1970) and the bytes of request `number`."""
        index = self._plan.device[number]
        device = self._fleet[index]
        made_us = device.made_us(self._base_us + self._plan.offset_us[number])
        body = body_us(device, made_us, made_us // (60 * MICROS))
        return index, made_us, b"%b%d\r\n\r\n%b" % (self._heads[index], len(body), body)


class Spliced:
    """Heartbeats of a fleet of any size: bucket after bucket, in each of them one heartbeat of each device, in random
    order, as the rows of a real fleet are scattered over the tables.

    Only the token, the id, the number of the shop (in the alias and in the network's name) and the time are the
    device's own; the rest is one of 512 bodies. Splicing a request takes 2 µs, making a body takes 10 µs, and half a
    million complete devices would take a minute and a gigabyte. The same accounts and buckets give the same keys.
    """

    def __init__(self, to: Target, accounts: Sequence[Account | Device], buckets: range, seed: int = 1) -> None:
        self._ids = [account.device_id.encode() for account in accounts]
        self._tokens = [account.token.encode() for account in accounts]
        self._buckets = buckets
        self._order = list(range(len(accounts)))
        # each range of buckets has its own order of the devices
        random.Random(f"nexhb crowd:{seed}:{buckets.start}").shuffle(self._order)
        number = min(_TEMPLATES, len(accounts))
        self._templates = [_template(to, at, seed, buckets.start * MICROS) for at in range(number)]
        self.devices = len(accounts)

    def __len__(self) -> int:
        return self.devices * len(self._buckets)

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Return the device, the timestamp (µs since 1970) and the bytes of request `number`."""
        step, place = divmod(number, self.devices)
        device = self._order[place]
        # each device has its own second of the bucket
        second, device_id = self._buckets[step] + device % _BUCKET_S, self._ids[device]
        template, length, fraction_us = self._templates[device % len(self._templates)]
        parts = {
            b"token": self._tokens[device],
            b"length": length + len(device_id),
            b"id": device_id,
            b"store": b"%05d" % (device // _KIOSKS_PER_STORE % _STORE),
            b"second": second_text(second),
        }
        return device, second * MICROS + fraction_us, template % parts


def _template(to: Target, number: int, seed: int, first_us: int) -> tuple[bytes, int, int]:
    """Return a request with placeholders, the length of its body without the id, and the microseconds of its time."""
    known = Account("{id}", f"Store {_STORE} - kiosk {number % _KIOSKS_PER_STORE + 1}", "{token}")
    device = make_device((_STORE - 1) * _KIOSKS_PER_STORE + number % _KIOSKS_PER_STORE, f"{seed}:{number}", known)
    made_us = device.made_us(first_us + 1_001 * (1 + number % 900))
    body = body_us(device, made_us, number)
    raw = to.head(device.token) + b"{length}\r\n\r\n" + body
    places = {
        b"%": b"%%",
        b"{token}": b"%(token)b",
        b"{length}": b"%(length)d",
        b"{id}": b"%(id)b",
        b"%d" % _STORE: b"%(store)b",
        second_text(made_us // MICROS): b"%(second)b",
    }
    for what, place in places.items():
        raw = raw.replace(what, place)
    return raw, len(body) - len(b"{id}"), made_us % MICROS


class Batches:
    """Requests of POST /v1/heartbeats, each with a queue of one device. All are made before the run and take 0.6 MB
    each.

    A queue has one heartbeat per bucket. The first queue of every device comes first, then the second of every device,
    and so on.
    """

    def __init__(self, to: Target, fleet: Sequence[Device], buckets: range, form: Form, numbers: Iterable[int]) -> None:
        """Make the queues with these numbers."""
        self.to = replace(to, path=f"{to.path}s", media=_MEDIA[form])
        self.devices = len(fleet)
        self._queues: list[tuple[int, list[int]]] = []
        self._requests: list[bytes] = []
        for number in numbers:
            at, index = divmod(number, len(fleet))
            device, part = fleet[index], buckets[at * QUEUE : (at + 1) * QUEUE]
            if len(part) < QUEUE:
                raise ValueError(f"queue {number} needs more than the {len(buckets)} buckets there are")
            # each device has its own second of the bucket, and its own fraction of a second
            own_us = index % _BUCKET_S * MICROS + 1_001 * (1 + index % 900)
            made_us = [device.made_us(start_s * MICROS + own_us) for start_s in part]
            items = [body_us(device, each_us, n) for n, each_us in enumerate(made_us)]
            body = b"[%b]" % b",".join(items) if form == "array" else b"\n".join(items) + b"\n"
            self._queues.append((index, made_us))
            self._requests.append(b"%b%d\r\n\r\n%b" % (self.to.head(device.token), len(body), body))

    def __len__(self) -> int:
        return len(self._requests)

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Return the device, the first timestamp (µs since 1970) and the bytes of request `number`."""
        device, made_us = self._queues[number]
        return device, made_us[0], self._requests[number]

    def heartbeats(self, sends: SendLog) -> SendLog:
        """Return the record of a run by heartbeat: each heartbeat has the outcome of its request."""
        out = SendLog()
        for (device, made_us), outcome in zip(self._queues, sends.outcome, strict=False):
            for ts_us in made_us:
                out.outcome[out.add(device, ts_us)] = outcome
        return out


Requests = Scheduled | Spliced | Batches
