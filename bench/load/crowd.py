"""A crowd: a fleet of any size whose requests are spliced from a few hundred devices' bodies, each with a token, an id
and a store of its own. Half a million full devices would take a minute to make and a gigabyte."""

from __future__ import annotations

import base64
import hashlib
import random
import uuid
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import asyncpg

from bench.fleet import MICROS, body_us, known_device, second_text
from bench.load.pool import Span
from bench.load.target import Target

_KIOSKS_PER_STORE: Final = 8
_TEMPLATES: Final = 512
# five digits, as every store of the crowd has: the body's length is its template's
_STORE: Final = 99_999
_ADD_DEVICES: Final = "INSERT INTO devices (device_id) SELECT unnest($1::text[])"
_ADD_TOKENS: Final = """
INSERT INTO device_tokens (token_sha256, device_no)
SELECT t.token_sha256, d.device_no FROM unnest($1::text[], $2::bytea[]) AS t (device_id, token_sha256)
JOIN devices d USING (device_id)
"""


class Kiosk(NamedTuple):
    """One of the crowd."""

    device_id: str
    token: str


def crowd(n: int, seed: int) -> tuple[Kiosk, ...]:
    """The first `n` kiosks of a seed; 3 µs each."""
    if n > _STORE * _KIOSKS_PER_STORE:
        raise ValueError(f"{n} kiosks want more stores than five digits number")
    return tuple(_kiosks(n, seed))


def _kiosks(n: int, seed: int) -> Iterator[Kiosk]:
    for index in range(n):
        digest = hashlib.sha512(b"nexhb crowd:%d:%d" % (seed, index)).digest()
        token = base64.urlsafe_b64encode(digest[:32]).rstrip(b"=").decode()
        yield Kiosk(str(uuid.UUID(bytes=digest[32:48], version=4)), token)


async def make_known(conn: asyncpg.Connection, kiosks: Sequence[Kiosk]) -> None:
    """Devices and tokens, by two statements: an import by CSV takes a minute for half a million."""
    ids = [kiosk.device_id for kiosk in kiosks]
    async with conn.transaction():
        await conn.execute(_ADD_DEVICES, ids)
        await conn.execute(_ADD_TOKENS, ids, [hashlib.sha256(kiosk.token.encode()).digest() for kiosk in kiosks])
    await conn.execute("VACUUM (ANALYZE) devices, device_tokens")


class CrowdRequests:
    """Requests of distinct (kiosk, bucket), bucket after bucket, in each of them every kiosk once in an order of
    chance: a fleet's heartbeats lie anywhere in its tables."""

    def __init__(self, to: Target, kiosks: Sequence[Kiosk], span: Span, seed: int) -> None:
        """Make the templates."""
        self._first_s = span.first_us // MICROS
        self._ids = [kiosk.device_id.encode() for kiosk in kiosks]
        self._tokens = [kiosk.token.encode() for kiosk in kiosks]
        self._buckets = span.buckets
        self._order = array("i", range(len(kiosks)))
        # so that a run may send each bucket of a stretch, or the stretch behind it, in another order
        random.Random(f"nexhb crowd:{seed}:{span.first_us}").shuffle(self._order)
        self._templates, self._fractions_us = [], array("q")
        for number in range(min(_TEMPLATES, len(kiosks))):
            template, fraction_us = _template(to, number, seed, span.first_us)
            self._templates.append(template)
            self._fractions_us.append(fraction_us)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ids) * self._buckets

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Request `number`: its kiosk, its timestamp (µs since 1970) and its bytes."""
        step, place = divmod(number, len(self._ids))
        kiosk = self._order[place]
        second = self._first_s + step * 10 + kiosk % 10
        at = kiosk % len(self._templates)
        parts = {
            b"token": self._tokens[kiosk],
            b"id": self._ids[kiosk],
            b"store": b"%05d" % (kiosk // _KIOSKS_PER_STORE),
            b"second": second_text(second),
        }
        return kiosk, second * MICROS + self._fractions_us[at], self._templates[at] % parts


def _template(to: Target, number: int, seed: int, first_us: int) -> tuple[bytes, int]:
    """A device's request with places for token, id, store and second, and the microseconds of its timestamps."""
    known = ("{id}", f"Store {_STORE} - kiosk {number % _KIOSKS_PER_STORE + 1}", "{token}")
    device = known_device((_STORE - 1) * _KIOSKS_PER_STORE + number % _KIOSKS_PER_STORE, f"{seed}:{number}", known)
    made_us = device.made_us(first_us + 1_001 * (1 + number % 900))
    # an id is longer than its place
    body = body_us(device, made_us, number).replace(b"{id}", b"-" * 36)
    raw = b"%b%d\r\n\r\n%b" % (to.head(device), len(body), body)
    for what, place in (
        (b"%", b"%%"),
        (b"{token}", b"%(token)b"),
        (b"-" * 36, b"%(id)b"),
        (b"%d" % _STORE, b"%(store)b"),
        (second_text(made_us // MICROS), b"%(second)b"),
    ):
        raw = raw.replace(what, place)
    return raw, made_us % MICROS
