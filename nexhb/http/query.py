"""Query parameters: read, bounded, and refused by name."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime

from aiohttp import web

from nexhb.http.problem import Problem
from nexhb.wire import FieldError

_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
_RUNS = re.compile(r"[a-z_]{1,50}:[0-9]{1,15}(,[a-z_]{1,50}:[0-9]{1,15})*", re.ASCII)
_LATEST = datetime(2080, 1, 1, tzinfo=UTC)


def bad(name: str, message: str) -> Problem:
    """A 400 Problem that names the parameter."""
    return Problem(400, f"The parameter {name} is not valid.", errors=[FieldError(name, message)])


def check(request: web.Request, known: tuple[str, ...]) -> None:
    """Raise a 400 Problem that names each parameter that is not known here or is given twice: `?dryrun=true` must not
    run what `?dry_run=true` only plans."""
    if not request.rel_url.raw_query_string:
        return
    takes = f"takes {', '.join(known)}" if known else "takes no parameters"
    errors = [
        FieldError(name[:100], "is given twice" if name in known else f"is not known here: the call {takes}")
        for name, count in Counter(request.query.keys()).items()
        if name not in known or count > 1
    ]
    if errors:
        raise Problem(400, "; ".join(f"{e.path}: {e.message}" for e in errors[:10]) + ".", errors=errors[:10])


def number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises a 400 Problem that names the parameter."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
        raise bad(name, f"takes a whole number from {low} to {high}")
    return int(text)


def runs(request: web.Request, name: str) -> dict[str, int] | None:
    """`nightly:120,reconcile:88`: run numbers by job; None where it is not there. Raises a 400 Problem that names the
    parameter."""
    text = request.query.get(name, "")
    if not text:
        return None
    if len(text) > 1_000 or not _RUNS.fullmatch(text):
        raise bad(name, "takes the next of the page before")
    return {job: int(number) for job, _, number in (part.partition(":") for part in text.split(","))}


def moment(request: web.Request, name: str, default: datetime) -> datetime:
    """A time with its zone, as UTC. Raises a 400 Problem that names the parameter."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        # A "+" of an offset arrives as a space where the caller did not escape it.
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        if moment.tzinfo is None:
            raise bad(name, "needs a time zone: 2026-11-24T00:00:00Z")
        # "Everything" is often written as year 1 or 9999, which PostgreSQL's arithmetic and ours do not reach.
        return min(max(moment.astimezone(UTC), _EARLIEST), _LATEST)
    except OverflowError:  # year 1 or 9999, with an offset
        return _EARLIEST if moment.year == 1 else _LATEST
    except ValueError:
        raise bad(name, "takes an ISO 8601 time with zone: 2026-11-24T00:00:00Z") from None


def text(request: web.Request, name: str, longest: int = 100) -> str:
    """Up to `longest` characters. Raises a 400 Problem that names the parameter."""
    text = request.query.get(name, "")
    if len(text) > longest or "\0" in text:
        raise bad(name, f"takes up to {longest} characters")
    return text


def switch(request: web.Request, name: str) -> bool:
    """`?name`, `?name=true` or `?name=1`; false where it is not there. Raises a 400 Problem for anything else."""
    given = request.query.get(name, "false").lower()
    if given not in ("", "1", "true", "0", "false"):
        raise bad(name, "takes true or false")
    return given in ("", "1", "true")
