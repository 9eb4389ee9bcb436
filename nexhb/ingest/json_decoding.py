"""Decode JSON with msgspec, and describe why a body cannot be decoded. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from nexhb.heartbeat import (
    FieldError,
    Refused,
)

T = TypeVar("T")
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def decode(decoder: Callable[[bytes], T], body: bytes) -> T:
    try:
        return decoder(body)
    except UNREADABLE as error:
        # The decoder rejects a lone surrogate (`\ud83d`) everywhere, even in a field that nexhb ignores. Replaced by
        # U+0000, it is rejected only in a field that is stored, and the error names the field.
        replaced = _replace_lone_surrogates(body) if b"\\u" in body else body
        if replaced == body:
            raise refused(error, body) from None
    return decode(decoder, replaced)


# Matches a run without lone surrogates, as a group, or one lone surrogate. A match per escape, with a function call for
# each, took five times as long.
_LONE_SURROGATES = re.compile(
    rb"((?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(?!u[dD][89a-fA-F][0-9a-fA-F]{2}).?)++)"
    rb"|\\u.{4}",
    re.DOTALL,
)


def _replace_lone_surrogates(body: bytes) -> bytes:
    return b"".join([run or rb"\u0000" for run in _LONE_SURROGATES.findall(body)])


def refused(error: Exception, body: bytes) -> Refused:
    if isinstance(error, RecursionError):
        return Refused([FieldError("", "is nested too deeply")], 400)
    if isinstance(error, msgspec.ValidationError):
        message, _, path = str(error).partition(" - at `")
        if "missing required field" in message:
            message, field = "is required", message.rpartition("`")[0].rpartition("`")[2]
            return Refused([FieldError(join(_path(path), field), message)])
        return Refused([FieldError(_path(path), _lower_first(message))])
    if not body.strip():
        return Refused([FieldError("", "is empty: a JSON object is expected")], 400)
    return Refused([FieldError("", f"is not JSON: {error}")], 400)


def _path(text: str) -> str:
    return text.strip("`").removeprefix("$").removeprefix(".")


def join(left: str, right: str) -> str:
    return f"{left}.{right}" if left and right else left or right


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
