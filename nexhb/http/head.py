"""The head of POST /v1/heartbeat, read strictly. Pure.

Only what leaves no doubt is understood: the exact request line, fields of a known list, each as plain printable text,
one key, one length, and exactly so many bytes behind it. Whatever else HTTP allows is for aiohttp to judge, so that
the two never read the same bytes differently.
"""

from __future__ import annotations

from typing import NamedTuple

_LINE = b"POST /v1/heartbeat HTTP/1.1\r\n"
_HEAD_MOST = 4096  # bytes; an agent's has 250

_KNOWN = (
    b"host", b"authorization", b"content-length", b"content-type", b"connection", b"user-agent", b"accept",
    b"accept-encoding", b"accept-language", b"accept-charset", b"cache-control", b"pragma", b"date", b"origin",
    b"referer", b"via", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
    b"x-forwarded-port", b"x-real-ip", b"x-request-id", b"traceparent", b"tracestate",
)  # fmt: skip
_BITS = {name: 1 << number for number, name in enumerate(_KNOWN)}
_NEEDED = _BITS[b"host"] | _BITS[b"authorization"] | _BITS[b"content-length"]
_JSON = frozenset((b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"))

# Fields, by how they begin, that may put a body or another protocol behind a head. A leading blank continues a field.
_FRAMING = (b"content-length", b"transfer-encoding", b"upgrade", b"expect", b" ", b"\t")

# Lines seen before that say nothing of importance, each with its field's bit: a fleet sends the same ones.
_harmless: dict[bytes, int] = {}
_HARMLESS_MOST = 4096
_HARMLESS_LENGTH = 100


class Request(NamedTuple):
    """A heartbeat as it came."""

    token: bytes
    body: bytes


INCOMPLETE = Request(b"", b"")  # understood so far; the rest has not come yet


def read(data: bytes, body_most: int) -> Request | None:
    """The one request that `data` is; INCOMPLETE where it may become one; None where it is anything else."""
    if not data.startswith(_LINE):
        return None
    end = data.find(b"\r\n\r\n", len(_LINE) - 2, _HEAD_MOST)
    if end < 0:
        return INCOMPLETE if len(data) < _HEAD_MOST else None
    token = b""
    length = 0
    seen = 0
    for line in data[len(_LINE) : end].split(b"\r\n"):
        bit = _harmless.get(line)
        if bit is None:
            name, colon, value = line.partition(b":")
            name, value = name.lower(), value.strip(b" ")
            bit = _BITS.get(name, 0) if colon else 0
            if name == b"content-length" and value.isdigit() and len(value) < 8:
                length = int(value)
            elif name == b"authorization" and value[:7].lower() == b"bearer " and _is_plain(value):
                token = value[7:].strip(b" ")
            elif not bit or not _is_harmless(line, name, value):
                return None
            elif len(line) <= _HARMLESS_LENGTH:
                _remember(line, bit)
        if seen & bit:
            return None
        seen |= bit
    size = len(data) - end - 4
    if seen & _NEEDED != _NEEDED or not token or not 0 < length <= body_most or size > length:
        return None
    return Request(token, data[end + 4 :]) if size == length else INCOMPLETE


def is_bodiless(data: bytes) -> bool:
    """Whether `data` is one whole GET without a body, behind which the next request begins. A proxy asks how we are on
    the connections that carry heartbeats."""
    end = data.find(b"\r\n\r\n", 0, _HEAD_MOST)
    if not data.startswith(b"GET /") or end != len(data) - 4:
        return False
    lines = data[:end].split(b"\r\n")
    return all(map(_is_plain, lines)) and not any(line.lower().startswith(_FRAMING) for line in lines[1:])


def _is_harmless(line: bytes, name: bytes, value: bytes) -> bool:
    """Whether a known field changes nothing about what the request is. A type other than JSON and `Connection: close`
    do."""
    match name:
        case b"authorization" | b"content-length":
            return False
        case b"content-type":
            return value.lower() in _JSON
        case b"connection":
            return value.lower() == b"keep-alive"
    return _is_plain(line)


def _remember(line: bytes, bit: int) -> None:
    if len(_harmless) >= _HARMLESS_MOST:
        _harmless.clear()
    _harmless[line] = bit


def _is_plain(text: bytes) -> bool:
    """Printable ASCII, so no bare CR, LF or NUL."""
    return text.isascii() and text.decode("ascii").isprintable()
