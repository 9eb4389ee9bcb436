"""Read and validate query parameters."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime

from aiohttp import web

from nexhb.heartbeat import FieldError
from nexhb.http.transport.problem import Problem

_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
_RUNS = re.compile(r"[a-z_]{1,50}:[0-9]{1,15}(,[a-z_]{1,50}:[0-9]{1,15})*", re.ASCII)
_LATEST = datetime(2080, 1, 1, tzinfo=UTC)


def invalid(name: str, message: str) -> Problem:
    """Return a 400 Problem that names the parameter."""
    return Problem(400, f"The parameter {name} is not valid.", errors=[FieldError(name, message)])


def check(request: web.Request, known: tuple[str, ...]) -> None:
    """Raise a 400 Problem that names each parameter that is unknown or given twice: `?dryrun=true` must not run what
    `?dry_run=true` only plans."""
    if not request.rel_url.raw_query_string:
        return
    accepted = ", ".join(known) or "none"
    errors = [
        FieldError(name[:100], "is given twice" if name in known else f"is unknown; accepted parameters: {accepted}")
        for name, count in Counter(request.query.keys()).items()
        if name not in known or count > 1
    ]
    if errors:
        raise Problem(400, "; ".join(f"{e.path}: {e.message}" for e in errors[:10]) + ".", errors=errors[:10])


def number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """Return an integer from `low` to `high`. Raise a 400 Problem that names the parameter."""
    text = request.query.get(name)
    return default if text is None else integer(name, text, low, high)


def integer(name: str, text: str, low: int, high: int) -> int:
    """Return the integer of a parameter's text. Raise a 400 Problem that names the parameter."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
        raise invalid(name, f"must be an integer from {low} to {high}")
    return int(text)


def job_runs(request: web.Request, name: str) -> dict[str, int] | None:
    """Return the run numbers by job of a parameter such as `nightly:120,reconcile:88`, or None if it is absent. Raise a
    400 Problem that names the parameter."""
    text = request.query.get(name, "")
    if not text:
        return None
    if len(text) > 1_000 or not _RUNS.fullmatch(text):
        raise invalid(name, "must be the `next` of the previous page")
    return {job: int(number) for job, _, number in (part.partition(":") for part in text.split(","))}


def moment(request: web.Request, name: str, default: datetime) -> datetime:
    """Return a time that has a zone, as UTC. Raise a 400 Problem that names the parameter."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        # The "+" of an offset arrives as a space if the client did not escape it.
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        if moment.tzinfo is None:
            raise invalid(name, "needs a time zone: 2026-11-24T00:00:00Z")
        # Clients write year 1 or 9999 to mean "everything", but date arithmetic overflows there.
        return min(max(moment.astimezone(UTC), _EARLIEST), _LATEST)
    except OverflowError:  # year 1 or 9999, with an offset
        return _EARLIEST if moment.year == 1 else _LATEST
    except ValueError:
        raise invalid(name, "must be an ISO 8601 time with zone: 2026-11-24T00:00:00Z") from None


def text(request: web.Request, name: str, max_length: int = 100) -> str:
    """Return a text of up to `max_length` characters. Raise a 400 Problem that names the parameter."""
    text = request.query.get(name, "")
    if len(text) > max_length or "\0" in text:
        raise invalid(name, f"must have at most {max_length} characters")
    return text


def choice(request: web.Request, name: str, values: tuple[str, ...]) -> str:
    """Return one of these values; the first if the parameter is absent. Raise a 400 Problem that names the
    parameter."""
    text = request.query.get(name, values[0])
    if text not in values:
        raise invalid(name, f"must be {', '.join(values[:-1])} or {values[-1]}")
    return text


def boolean(request: web.Request, name: str) -> bool:
    """Return True for `?name`, `?name=true` or `?name=1`, and False if the parameter is absent, `false` or `0`. Raise a
    400 Problem for any other value."""
    value = request.query.get(name, "false").lower()
    if value not in ("", "1", "true", "0", "false"):
        raise invalid(name, "must be true or false")
    return value in ("", "1", "true")
