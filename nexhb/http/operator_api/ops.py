"""Health, metrics, jobs, flags and enrolment keys: the calls of operators' tools."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from prometheus_async.aio.web import server_stats

from nexhb import __version__, metrics
from nexhb.devices import enrolment
from nexhb.errors import DatabaseUnavailable
from nexhb.heartbeat import FieldError
from nexhb.http.operator_api.context import OPERATOR_API
from nexhb.http.transport import body, query
from nexhb.http.transport.client import address_of
from nexhb.http.transport.problem import SERVER, Problem, json_response
from nexhb.reading import flags
from nexhb.texts import unfit

if TYPE_CHECKING:
    from nexhb.jobs.runner import JobRun


async def get_healthz(_request: web.Request) -> web.Response:
    """Return 200 while the event loop runs."""
    return json_response({"ok": True, "version": __version__})


async def get_readyz(request: web.Request) -> web.Response:
    """Return 200 if heartbeats can be committed, else 503 with every reason; with the admin key the reasons include
    PostgreSQL's messages."""
    api = request.app[OPERATOR_API]
    reasons = api.readiness.reasons(in_full=api.admin_key.is_in(request))
    texts = [f"{remark} Run nexhb doctor." for remark in (api.tracker.older_copy, api.adoption.problem) if remark]
    remarks = {"remarks": texts} if texts else {}
    return json_response({"ready": not reasons, "reasons": reasons, **remarks}, 503 if reasons else 200)


async def get_metrics(request: web.Request) -> web.StreamResponse:
    """Return the metrics for Prometheus, in the format that the client accepts."""
    api = request.app[OPERATOR_API]
    api.intake.observe()
    metrics.next_heartbeat.set(api.next_heartbeat_s())  # only here, not for each heartbeat: the gauge's lock costs 1 µs
    response = await server_stats(request)
    response.headers.update(SERVER)
    return response


async def post_nightly(request: web.Request) -> web.Response:
    """Run the nightly job now. With dry_run, only return what the job would do; with yes, also run a job that needs a
    confirmation. A failed run returns 500, so that a timer that calls this notices."""
    dry_run = query.boolean(request, "dry_run")
    yes = query.boolean(request, "yes")
    return _ended(await request.app[OPERATOR_API].jobs.nightly(dry_run=dry_run, confirmed=yes))


async def post_reconcile(request: web.Request) -> web.Response:
    """Run the reconciliation now; with dry_run only count the rows that it would repair."""
    dry_run = query.boolean(request, "dry_run")
    max_rows = query.number(request, "max_rows", 5_000, 1, 1_000_000)
    return _ended(await request.app[OPERATOR_API].jobs.reconcile(dry_run=dry_run, max_rows=max_rows))


def _ended(run: JobRun) -> web.Response:
    return json_response(run.as_dict(), 500 if run.status == "failed" else 200)


async def get_jobs(request: web.Request) -> web.Response:
    """Return the last runs of each job, newest first. `next` is the `after` of the following page, for the jobs that
    have more runs."""
    limit = query.number(request, "limit", 10, 1, 1_000)
    runs = await request.app[OPERATOR_API].jobs.last_runs(limit + 1, query.job_runs(request, "after"))
    by_job: dict[str, list[dict[str, Any]]] = {"nightly": [], "reconcile": []}
    for run in runs:
        by_job.setdefault(run.pop("job"), []).append(run)
    following = ",".join(f"{job}:{runs[limit - 1]['run_no']}" for job, runs in by_job.items() if len(runs) > limit)
    return json_response({"jobs": {job: runs[:limit] for job, runs in by_job.items()}, "next": following or None})


async def get_flags(request: web.Request) -> web.Response:
    """Return the flags that are in effect in this daemon."""
    return json_response(request.app[OPERATOR_API].flags.current.shown())


async def put_flags(request: web.Request) -> web.Response:
    """Change some flags for every daemon of the database, and return all flags."""
    api = request.app[OPERATOR_API]
    body.check_headers(request, max_bytes=4096, types=("application/json",))
    raw = await body.read(request, max_bytes=4096, timeout_s=api.settings.server.body_timeout_seconds)
    values = _object(raw or b"{}")
    changed_by = values.pop("changed_by", None)
    changes, errors = _checked(values)
    if changed_by is not None and not _is_valid_name(changed_by):
        errors.append(FieldError("changed_by", "must have 1 to 100 printable characters"))
    if errors:
        raise Problem(422, "; ".join(f"{e.path}: {e.message}" for e in errors) + ".", errors=errors)
    changed_by = changed_by or address_of(request, api.settings.server.trusted_proxies)
    try:
        current = await api.flags.change(changes, changed_by)
    except DatabaseUnavailable as error:
        raise Problem(503, str(error), headers={"Retry-After": "5"}) from error
    return json_response(current.shown())


def _is_valid_name(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 100 and not unfit(value)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The request is not valid: {error}") from None
    if not isinstance(value, dict):
        raise Problem(422, "The body must be a JSON object.")
    return value


def _checked(values: dict[str, Any]) -> tuple[dict[str, flags.Value], list[FieldError]]:
    changes: dict[str, flags.Value] = {}
    errors: list[FieldError] = []
    for flag, value in values.items():
        try:
            changes[flag] = flags.check(flag, value)
        except ValueError as error:
            errors.append(FieldError(flag[:100], str(error)))
    return changes, errors


class _KeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    # float, because msgspec's int rejects an integral double such as 1.0.
    uses: float = 1.0
    expires_in_seconds: float = 7 * 86400.0
    note: str | None = None
    site: str | None = None


async def post_enrolment_key(request: web.Request) -> web.Response:
    """Create a key with which devices may register themselves; it is shown only this once."""
    api = request.app[OPERATOR_API]
    body.check_headers(request, max_bytes=4096, types=("application/json",))
    raw = await body.read(request, max_bytes=4096, timeout_s=api.settings.server.body_timeout_seconds)
    try:
        key_request = msgspec.json.decode(raw or b"{}", type=_KeyRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The request is not valid: {error}") from None
    uses, seconds = key_request.uses, key_request.expires_in_seconds
    are_integers = uses.is_integer() and seconds.is_integer()
    if not (are_integers and 1 <= uses <= 1_000_000 and 60 <= seconds <= 366 * 86400):
        raise Problem(422, "uses must be an integer from 1 to 1,000,000, expires_in_seconds one from 60 to 31,622,400.")
    expires_at = api.now() + timedelta(seconds=seconds)
    async with api.changes.connection() as conn:
        key = await enrolment.issue_enrolment_key(
            conn, note=key_request.note, uses=int(uses), expires_at=expires_at, site=key_request.site
        )
    return json_response({"enrolment_key": key, "uses": int(uses), "expires_at": expires_at})
