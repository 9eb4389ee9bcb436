"""Check the values of settings: durations have a text form, and a text may neither be blank nor contain a variable.
Pure."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, SecretStr

_UNITS = {
    "s": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}|\([^)]*\))")


def parse_duration(value: object) -> object:
    """Return the timedelta for `7 days`, `5 minutes`, `90s` or a number of seconds. Values of other types are returned
    unchanged, for pydantic to reject."""
    if not isinstance(value, int | float | str):
        return value
    match = _DURATION.fullmatch(str(value).lower())
    unit = match and (match[2] or "s")
    if not match or unit not in _UNITS:
        raise ValueError('must be a duration such as "7 days" or "5 minutes", or a number of seconds')
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[str(unit)])
    except OverflowError:
        raise ValueError("is too long to be represented") from None


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]


def check(value: object, annotation: Any) -> object:
    """Check the value of a key, as written in the environment or a file, before its conversion. Keys of the same type
    have the same rules. Return the value, or None for an empty secret, which counts as unset. Raises ValueError."""
    types = {annotation, *get_args(annotation)}
    if isinstance(value, bool) and bool not in types:
        raise ValueError("must not be true or false")
    if not isinstance(value, str):
        return value
    if not value.strip():
        if SecretStr in types:
            return None
        raise ValueError("must not be empty or blank")
    return _check_text(value, types) if types & {str, Path, SecretStr} else value


def _check_text(value: str, types: set[Any]) -> str:
    if value != value.strip():
        raise ValueError("begins or ends with a space or a line break")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError("contains a control character")
    # A secret may contain a dollar sign, but is hardly ever just the name of a variable.
    if (_VARIABLE.fullmatch if SecretStr in types else _VARIABLE.search)(value):
        raise ValueError("contains a variable such as $NAME, which is not expanded: write the value itself")
    if Path in types and not value.startswith("/"):
        raise ValueError("must be an absolute path" + ("; ~ is not expanded" if value.startswith("~") else ""))
    return value
