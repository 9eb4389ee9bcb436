"""Read the head of POST /v1/heartbeat strictly. Pure.

Only an unambiguous request is accepted: the exact request line, known header fields of printable ASCII, one key, one
length, and a body of exactly that length. Everything else that HTTP allows is left to aiohttp, so that the two never
interpret the same bytes differently.
"""

from __future__ import annotations

import msgspec

_LINE = b"POST /v1/heartbeat HTTP/1.1\r\n"
_LINE_WITH_SLASH = b"POST //v1/heartbeat HTTP/1.1\r\n"  # from an agent whose server_url ends in a slash
_MAX_HEAD_BYTES = 4096  # an agent's head has 250 bytes

_KNOWN = (
    b"host", b"authorization", b"content-length", b"content-type", b"connection", b"user-agent", b"accept",
    b"accept-encoding", b"accept-language", b"accept-charset", b"cache-control", b"pragma", b"date", b"origin",
    b"referer", b"via", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
    b"x-forwarded-port", b"x-real-ip", b"x-request-id", b"traceparent", b"tracestate",
)  # fmt: skip
_BITS = {name: 1 << number for number, name in enumerate(_KNOWN)}
_HOST, _KEY, _LENGTH = _BITS[b"host"], _BITS[b"authorization"], _BITS[b"content-length"]
_JSON = frozenset((b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"))

# Prefixes of fields that may announce a body or another protocol. A leading blank continues the previous field.
_FRAMING = (b"content-length", b"transfer-encoding", b"upgrade", b"expect", b" ", b"\t")

# A cache of header lines that do not affect the interpretation, with the bits of their fields: a fleet repeats these.
_harmless: dict[bytes, int] = {}
_MAX_CACHED_LINES = 4096
_MAX_CACHED_LENGTH = 100


class Request(msgspec.Struct, frozen=True, gc=False):
    """A complete request with a heartbeat."""

    token: bytes
    body: bytes


INCOMPLETE = Request(b"", b"")  # the bytes so far are acceptable; the rest has not arrived yet


def read(data: bytes, max_body_bytes: int) -> Request | None:
    """Return the request if `data` is exactly one request, INCOMPLETE if it may become one, else None."""
    start = len(_LINE)
    if not data.startswith(_LINE):
        if not data.startswith(_LINE_WITH_SLASH):
            return None
        start = len(_LINE_WITH_SLASH)
    end = data.find(b"\r\n\r\n", start - 2, _MAX_HEAD_BYTES)
    if end < 0:
        return INCOMPLETE if len(data) < _MAX_HEAD_BYTES else None
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
    if not seen & _HOST or not token or not 0 < length <= max_body_bytes or size > length:
        return None
    return Request(token, data[end + 4 :]) if size == length else INCOMPLETE


def is_bodiless(data: bytes) -> bool:
    """Return whether `data` is exactly one GET or HEAD without a body, so that the next request follows. A proxy sends
    its health checks on the connections that carry heartbeats."""
    end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
    if not data.startswith((b"GET /", b"HEAD /")) or end != len(data) - 4:
        return False
    lines = data[:end].split(b"\r\n")
    return all(map(_is_plain, lines)) and not any(line.lower().startswith(_FRAMING) for line in lines[1:])


def _bit_of(line: bytes) -> int:
    """Return the bit of a header line's field. Return 0 if the field is unknown, or if aiohttp has to interpret its
    value (a type other than JSON, or `Connection: close`)."""
    name, colon, value = line.partition(b":")
    name = name.lower()
    bit = _BITS.get(name, 0) if colon else 0
    if bit in (_KEY, _LENGTH):
        return bit  # read separately and never cached: every device has a different one
    if name == b"content-type":
        harmless = value.strip(b" ").lower() in _JSON
    elif name == b"connection":
        harmless = value.strip(b" ").lower() == b"keep-alive"
    else:
        harmless = _is_plain(line)
    if not bit or not harmless:
        return 0
    if len(line) <= _MAX_CACHED_LENGTH:
        if len(_harmless) >= _MAX_CACHED_LINES:
            _harmless.clear()
        _harmless[line] = bit
    return bit


def _token_in(line: bytes) -> bytes:
    """Return the token of `Authorization: Bearer …`, or b""."""
    value = line.partition(b":")[2].strip(b" ")
    return value[7:].strip(b" ") if value[:7].lower() == b"bearer " and _is_plain(value) else b""


def _length_in(line: bytes) -> int:
    value = line.partition(b":")[2].strip(b" ")
    return int(value) if value.isdigit() and len(value) < 8 else 0


def _is_plain(text: bytes) -> bool:
    """Return whether the text is printable ASCII, and so has no bare CR, LF or NUL."""
    return text.isascii() and text.decode("ascii").isprintable()
