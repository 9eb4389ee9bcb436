"""Health, metrics and what else operators' tools call."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from prometheus_async.aio.web import server_stats

from nexhb import __version__, devices, flags, metrics
from nexhb.errors import DatabaseUnavailable
from nexhb.http import auth, body, query
from nexhb.http.client import address_of
from nexhb.http.parts import PARTS, writable_connection
from nexhb.http.problem import SERVER, Problem, answer
from nexhb.texts import unfit
from nexhb.wire import FieldError

if TYPE_CHECKING:
    from nexhb.jobs.runner import Run


async def get_healthz(_request: web.Request) -> web.Response:
    """Alive: the event loop turns."""
    return answer({"ok": True, "version": __version__})


async def get_readyz(request: web.Request) -> web.Response:
    """Able to commit, or 503 with every reason why not; with the admin key, in the database's own words."""
    parts = request.app[PARTS]
    reasons = parts.not_ready(auth.is_admin(request, parts))
    found = [f"{remark} Run nexhb doctor." for remark in (parts.lives.older, parts.adoption.trouble) if remark]
    remarks = {"remarks": found} if found else {}
    return answer({"ready": not reasons, "reasons": reasons, **remarks}, 503 if reasons else 200)


async def get_metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus, in the format that the caller accepts."""
    parts = request.app[PARTS]
    parts.intake.observe()
    metrics.next_heartbeat.set(parts.next_heartbeat_s())  # here: a gauge's lock on each heartbeat would cost 1 µs
    response = await server_stats(request)
    response.headers.update(SERVER)
    return response


async def post_nightly(request: web.Request) -> web.Response:
    """The nightly run, now; with dry_run only its plan, with yes also where it would ask first. A run that failed is
    answered 500, so that whoever calls it by a timer notices."""
    dry_run = query.switch(request, "dry_run")
    yes = query.switch(request, "yes")
    return _ended(await request.app[PARTS].jobs.nightly(dry_run=dry_run, yes=yes))


async def post_reconcile(request: web.Request) -> web.Response:
    """The reconciliation, now; with dry_run it only counts."""
    dry_run = query.switch(request, "dry_run")
    max_rows = query.number(request, "max_rows", 5_000, 1, 1_000_000)
    return _ended(await request.app[PARTS].jobs.reconcile(dry_run=dry_run, max_rows=max_rows))


def _ended(run: Run) -> web.Response:
    return answer(run.shown(), 500 if run.status == "failed" else 200)


async def get_jobs(request: web.Request) -> web.Response:
    """Each job's last runs, newest first. `next` is the `after` of the page behind it, of those jobs that have more."""
    limit = query.number(request, "limit", 10, 1, 1_000)
    runs = await request.app[PARTS].jobs.last_runs(limit + 1, query.runs(request, "after"))
    by_job: dict[str, list[dict[str, Any]]] = {"nightly": [], "reconcile": []}
    for run in runs:
        by_job.setdefault(run.pop("job"), []).append(run)
    following = ",".join(f"{job}:{runs[limit - 1]['run_no']}" for job, runs in by_job.items() if len(runs) > limit)
    return answer({"jobs": {job: runs[:limit] for job, runs in by_job.items()}, "next": following or None})


async def get_flags(request: web.Request) -> web.Response:
    """The flags as they are in force in this daemon."""
    return answer(request.app[PARTS].flags.current.shown())


async def put_flags(request: web.Request) -> web.Response:
    """Change some of them, for every daemon of the database; answers all."""
    parts = request.app[PARTS]
    body.check_headers(request, most=4096, types=("application/json",))
    raw = await body.read(request, most=4096, timeout_s=parts.settings.server.body_timeout_seconds)
    wanted = _object(raw or b"{}")
    by = wanted.pop("changed_by", None)
    changes, wrong = _checked(wanted)
    if by is not None and not (isinstance(by, str) and 1 <= len(by) <= 100 and not unfit(by)):
        wrong.append(FieldError("changed_by", "takes 1 to 100 printable characters"))
    if wrong:
        raise Problem(422, "; ".join(f"{e.path}: {e.message}" for e in wrong) + ".", errors=wrong)
    try:
        now = await parts.flags.change(changes, by or address_of(request, parts.settings.server.trusted_proxies))
    except DatabaseUnavailable as error:
        raise Problem(503, str(error), headers={"Retry-After": "5"}) from error
    return answer(now.shown())


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The request is not valid: {error}") from None
    if not isinstance(found, dict):
        raise Problem(422, "The body takes an object.")
    return found


def _checked(wanted: dict[str, Any]) -> tuple[dict[str, flags.Value], list[FieldError]]:
    changes: dict[str, flags.Value] = {}
    wrong: list[FieldError] = []
    for flag, value in wanted.items():
        try:
            changes[flag] = flags.check(flag, value)
        except ValueError as error:
            wrong.append(FieldError(flag[:100], str(error)))
    return changes, wrong


class _KeyWanted(msgspec.Struct, forbid_unknown_fields=True):
    # An integral double is an integer: to msgspec's int it is none.
    uses: float = 1.0
    expires_in_seconds: float = 7 * 86400.0
    note: str | None = None


async def post_enrolment_key(request: web.Request) -> web.Response:
    """A key with which devices may register themselves; shown this once."""
    parts = request.app[PARTS]
    body.check_headers(request, most=4096, types=("application/json",))
    raw = await body.read(request, most=4096, timeout_s=parts.settings.server.body_timeout_seconds)
    try:
        wanted = msgspec.json.decode(raw or b"{}", type=_KeyWanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The request is not valid: {error}") from None
    uses, seconds = wanted.uses, wanted.expires_in_seconds
    whole = uses.is_integer() and seconds.is_integer()
    if not (whole and 1 <= uses <= 1_000_000 and 60 <= seconds <= 366 * 86400):
        raise Problem(422, "uses takes 1 to 1,000,000, expires_in_seconds a minute to a year; both are whole numbers.")
    expires_at = parts.now() + timedelta(seconds=seconds)
    async with writable_connection(parts) as conn:
        key = await devices.issue_enrolment_key(conn, note=wanted.note, uses=int(uses), expires_at=expires_at)
    return answer({"enrolment_key": key, "uses": int(uses), "expires_at": expires_at})
