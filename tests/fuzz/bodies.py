"""Mutate the example of wire.md. These functions are pure, except that they draw from the random generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import orjson

# Values that a program with an error may write into a field, and values that an attacker would try.
HOSTILE_VALUES: tuple[bytes, ...] = (
    b"null", b"true", b'""', b'" "', b"[]", b"{}", b"0", b"-0.0", b"1e400", b"-1e400", b"1e-400", b"NaN", b"Infinity",
    b"9223372036854775808", b"-9223372036854775809", b"99999999999999999999999999999999", b"0.1e1", b"1E2", b"01",
    b"+1",
    b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\uffff"', b'"\xff\xfe"', b'"\xc0\x80"', b'"\xed\xa0\x80"',
    b'"' + b"a" * 5000 + b'"', b"[" * 500, b"[" * 500 + b"]" * 500, b'{"a":' * 200, b'"\\', b'"2026-13-45T99:99:99Z"',
    b'"0000-00-00T00:00:00Z"', b'"9999-12-31T23:59:59Z"', b'"2026-11-24T02:00:00+25:00"', b"'single'", b"/* c */ 1",
    b'"; DROP TABLE devices; --"', b'"%s%n%x"', b'"\xe2\x80\xa8"', b'"\xf0\x9f\x92\xa9"', b"\x00", b"\xef\xbb\xbf1",
)  # fmt: skip


def malformed(example: dict[str, Any], chance: random.Random) -> bytes:
    """Return a body: the example after one to three mutations."""
    body = orjson.dumps(example)
    for _ in range(chance.randint(1, 3)):
        body = chance.choice(_MUTATIONS)(body, chance)
    return body[:60_000]


def _value(body: bytes, chance: random.Random) -> bytes:
    """Replace a value by a hostile one."""
    colons = [place for place, byte in enumerate(body) if byte == 0x3A]
    if not colons:
        return body + chance.choice(HOSTILE_VALUES)
    start = chance.choice(colons) + 1
    end = min((place for place in (body.find(b",", start), body.find(b"}", start)) if place > 0), default=len(body))
    return body[:start] + chance.choice(HOSTILE_VALUES) + body[end:]


def _bits(body: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(body or b"x")
    for _ in range(chance.randint(1, 8)):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def _cut(body: bytes, chance: random.Random) -> bytes:
    return body[: chance.randrange(len(body) + 1)]


def _slice(body: bytes, chance: random.Random) -> bytes:
    """Insert a copy of a piece of the body somewhere."""
    start = chance.randrange(len(body) + 1)
    piece = body[start : start + chance.randrange(400)]
    place = chance.randrange(len(body) + 1)
    return body[:place] + piece + body[place:]


def _without(body: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(body) + 1)
    return body[:start] + body[start + chance.randrange(60) :]


def _noise(_body: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(300))


def _wrapped(body: bytes, chance: random.Random) -> bytes:
    before, after = chance.choice(
        ((b"[", b"]"), (b'{"a":', b"}"), (b"\n", b"\n"), (b"\xef\xbb\xbf", b""), (b"", b"{}"))
    )
    return before + body + after


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _value, _value, _value, _value, _bits, _cut, _slice, _without, _noise, _wrapped,
)  # fmt: skip
