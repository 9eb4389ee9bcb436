"""The head of POST /v1/heartbeat, read strictly. Pure.

Only what leaves no doubt is understood: the exact request line, fields of a known list, each as plain printable text,
one key, one length, and exactly so many bytes behind it. Whatever else HTTP allows is for aiohttp to judge, so that
the two never read the same bytes differently.
"""

from __future__ import annotations

import msgspec

_LINE = b"POST /v1/heartbeat HTTP/1.1\r\n"
_SLASHED = b"POST //v1/heartbeat HTTP/1.1\r\n"  # of an agent whose server_url ends in a slash
_HEAD_MOST = 4096  # bytes; an agent's has 250

_KNOWN = (
    b"host", b"authorization", b"content-length", b"content-type", b"connection", b"user-agent", b"accept",
    b"accept-encoding", b"accept-language", b"accept-charset", b"cache-control", b"pragma", b"date", b"origin",
    b"referer", b"via", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
    b"x-forwarded-port", b"x-real-ip", b"x-request-id", b"traceparent", b"tracestate",
)  # fmt: skip
_BITS = {name: 1 << number for number, name in enumerate(_KNOWN)}
_HOST, _KEY, _LENGTH = _BITS[b"host"], _BITS[b"authorization"], _BITS[b"content-length"]
_JSON = frozenset((b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"))

# Fields, by how they begin, that may put a body or another protocol behind a head. A leading blank continues a field.
_FRAMING = (b"content-length", b"transfer-encoding", b"upgrade", b"expect", b" ", b"\t")

# Lines seen before that say nothing of importance, each with its field's bit: a fleet sends the same ones.
_harmless: dict[bytes, int] = {}
_HARMLESS_MOST = 4096
_HARMLESS_LENGTH = 100


class Request(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat as it came."""

    token: bytes
    body: bytes


INCOMPLETE = Request(b"", b"")  # understood so far; the rest has not come yet


def read(data: bytes, body_most: int) -> Request | None:
    """The one request that `data` is; INCOMPLETE where it may become one; None where it is anything else."""
    start = len(_LINE)
    if not data.startswith(_LINE):
        if not data.startswith(_SLASHED):
            return None
        start = len(_SLASHED)
    end = data.find(b"\r\n\r\n", start - 2, _HEAD_MOST)
    if end < 0:
        return INCOMPLETE if len(data) < _HEAD_MOST else None
    seen, key, length_line = 0, b"", b""
    for line in data[start:end].split(b"\r\n"):
        bit = _harmless.get(line) or _bit_of(line)
        if not bit or seen & bit:
            return None
        seen |= bit
        if bit == _KEY:
            key = line
        elif bit == _LENGTH:
            length_line = line
    token, length = _token_in(key), _length_in(length_line)
    size = len(data) - end - 4
    if not seen & _HOST or not token or not 0 < length <= body_most or size > length:
        return None
    return Request(token, data[end + 4 :]) if size == length else INCOMPLETE


def is_bodiless(data: bytes) -> bool:
    """Whether `data` is one whole GET or HEAD without a body, behind which the next request begins. A proxy asks how we
    are on the connections that carry heartbeats."""
    end = data.find(b"\r\n\r\n", 0, _HEAD_MOST)
    if not data.startswith((b"GET /", b"HEAD /")) or end != len(data) - 4:
        return False
    lines = data[:end].split(b"\r\n")
    return all(map(_is_plain, lines)) and not any(line.lower().startswith(_FRAMING) for line in lines[1:])


def _bit_of(line: bytes) -> int:
    """The field that a line is; 0 where it is none that is known, or says more than is understood here: a type other
    than JSON, `Connection: close`."""
    name, colon, value = line.partition(b":")
    name = name.lower()
    bit = _BITS.get(name, 0) if colon else 0
    if bit in (_KEY, _LENGTH):
        return bit  # looked at by itself, and never remembered: there are as many as devices
    if name == b"content-type":
        harmless = value.strip(b" ").lower() in _JSON
    elif name == b"connection":
        harmless = value.strip(b" ").lower() == b"keep-alive"
    else:
        harmless = _is_plain(line)
    if not bit or not harmless:
        return 0
    if len(line) <= _HARMLESS_LENGTH:
        if len(_harmless) >= _HARMLESS_MOST:
            _harmless.clear()
        _harmless[line] = bit
    return bit


def _token_in(line: bytes) -> bytes:
    """The token of `Authorization: Bearer …`, or nothing."""
    value = line.partition(b":")[2].strip(b" ")
    return value[7:].strip(b" ") if value[:7].lower() == b"bearer " and _is_plain(value) else b""


def _length_in(line: bytes) -> int:
    value = line.partition(b":")[2].strip(b" ")
    return int(value) if value.isdigit() and len(value) < 8 else 0


def _is_plain(text: bytes) -> bool:
    """Printable ASCII, so no bare CR, LF or NUL."""
    return text.isascii() and text.decode("ascii").isprintable()
