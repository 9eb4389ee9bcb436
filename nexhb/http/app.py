"""All routes in one table, and the wrapper that checks keys, measures latency and turns errors into problem details."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import HttpVersion11, web

from nexhb import log, metrics
from nexhb.errors import BadInput, SiteInUse, UnknownDevice, UnknownSite
from nexhb.heartbeat import FieldError
from nexhb.http.device_api import enrolment, heartbeats, queues
from nexhb.http.device_api.authentication import DEVICE
from nexhb.http.device_api.context import DEVICE_API, DeviceApi
from nexhb.http.operator_api import (
    archived,
    device_filters,
    devices,
    fleet,
    listing,
    messages,
    ops,
    sites,
    stream,
    uptime,
    watched,
)
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.transport.http_connection import HttpConnection
from nexhb.http.transport.problem import Problem
from nexhb.http.transport.query import check as check_query
from nexhb.postgres.errors import is_unavailable

_log = log.get("http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """A route. `query` names the parameters that it accepts; any other is refused."""

    method: str
    path: str
    handler: Handler
    key: str  # the key that it requires: device, enrolment, admin or none
    query: tuple[str, ...] = ()


LISTED = ("limit", "after", "format")  # the parameters of a list that is also available as CSV

ROUTES = (
    Route("POST", "/v1/heartbeat", heartbeats.post_heartbeat, "device"),
    Route("POST", "/v1/heartbeats", queues.post_heartbeats, "device"),
    Route("POST", "/v1/register", enrolment.post_register, "enrolment", ("alias",)),
    Route("GET", "/v1/fleet", fleet.get_fleet, "admin"),
    Route("GET", "/v1/devices", fleet.get_devices, "admin", (*LISTED, *device_filters.NAMES)),
    Route("GET", "/v1/devices/offline", fleet.get_offline, "admin", ("minutes", *LISTED, *device_filters.NAMES)),
    Route("GET", "/v1/devices/unity-down", fleet.get_unity_down, "admin", (*LISTED, *device_filters.NAMES)),
    Route("GET", "/v1/devices/{device_id}", fleet.get_device, "admin"),
    Route("PATCH", "/v1/devices/{device_id}", devices.patch_device, "admin"),
    Route("GET", "/v1/devices/{device_id}/heartbeats", fleet.get_history, "admin", ("from", "to", "archived", *LISTED)),
    Route("GET", "/v1/sites", sites.get_sites, "admin", ("limit", "after")),
    Route("GET", "/v1/sites/{site}", sites.get_site, "admin"),
    Route("PUT", "/v1/sites/{site}", sites.put_site, "admin"),
    Route("DELETE", "/v1/sites/{site}", sites.delete_site, "admin"),
    Route("GET", "/v1/devices/{device_id}/timeline", watched.get_timeline, "admin", ("from", "to")),
    Route(
        "GET",
        "/v1/events",
        watched.get_events,
        "admin",
        ("from", "to", "site", "kind", "device", "order", *LISTED),
    ),
    Route("GET", "/v1/incidents", watched.get_incidents, "admin", ("state", "site", *LISTED)),
    Route(
        "GET",
        "/v1/uptime",
        uptime.get_uptime,
        "admin",
        ("from", "to", "by", "site", "tag", "device", "format", "limit", "after"),
    ),
    Route("POST", "/v1/incidents/{incident_id}/ack", messages.post_ack, "admin"),
    Route("GET", "/v1/silences", messages.get_silences, "admin", ("limit", "after", "all")),
    Route("POST", "/v1/silences", messages.post_silence, "admin"),
    Route("DELETE", "/v1/silences/{silence_id}", messages.delete_silence, "admin"),
    Route("POST", "/v1/notify/{route}/test", messages.post_test, "admin"),
    Route("GET", "/v1/stream", stream.get_stream, "admin", ("site", "kind", "device")),
    Route("POST", "/ops/enrolment-keys", ops.post_enrolment_key, "admin"),
    Route("POST", "/ops/nightly", ops.post_nightly, "admin", ("dry_run", "yes")),
    Route("POST", "/ops/reconcile", ops.post_reconcile, "admin", ("dry_run", "max_rows")),
    Route("GET", "/ops/jobs", ops.get_jobs, "admin", ("limit", "after")),
    Route("GET", "/ops/flags", ops.get_flags, "admin"),
    Route("PUT", "/ops/flags", ops.put_flags, "admin"),
    Route("GET", "/metrics", ops.get_metrics, "admin"),
    Route("GET", "/healthz", ops.get_healthz, "none"),
    Route("GET", "/readyz", ops.get_readyz, "none"),
)


def make_app(device_api: DeviceApi, operator_api: OperatorApi) -> web.Application:
    """Return the application. Each handler limits its body; aiohttp's own limit is the largest of these limits.

    HEAD is accepted wherever GET is. Each path is also accepted with a second leading slash, because an agent whose
    server_url ends in a slash sends to //v1/heartbeat.
    """
    app = web.Application(client_max_size=device_api.settings.server.batch_body_max_bytes)
    app[DEVICE_API] = device_api
    app[OPERATOR_API] = operator_api
    app[stream.STREAMS] = Counter()
    app[listing.RUNNING] = Counter()
    app[archived.READING] = asyncio.Semaphore(archived.MAX_AT_ONCE)
    app.on_shutdown.append(stream.end_streams)
    for route in ROUTES:
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            handler = _wrapped(route.path, method, route.handler, admin=route.key == "admin", query=route.query)
            for path in (route.path, f"/{route.path}"):
                app.router.add_route(method, path, handler, expect_handler=_expect)
    unknown = _wrapped("other", "other", _no_such_route, admin=False, query=None)
    app.router.add_route("*", "/{tail:.*}", unknown, expect_handler=_expect)
    return app


def _wrapped(route: str, method: str, handler: Handler, *, admin: bool, query: tuple[str, ...] | None) -> Handler:
    """Return the handler with its key and parameters checked, its latency measured and its errors converted. This is
    not a middleware, because aiohttp would build the chain of middlewares for every request."""
    observe = metrics.http_request_latency_ms.series(route, method)

    async def call(request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        try:
            if admin:
                request.app[OPERATOR_API].admin_key.check(request)
            if query is not None:
                check_query(request, query)
            response = await handler(request)
        except Exception as error:
            # In a separate function: the problem's traceback refers to this frame, and a variable for the problem here
            # would complete a reference cycle.
            response = _refusal(error, request, admin=admin)
        except asyncio.CancelledError:
            observe(499, time.perf_counter() - started)
            raise
        observe(response.status, time.perf_counter() - started)
        return response

    return call


def _refusal(error: Exception, request: web.Request, *, admin: bool) -> web.Response:
    problem = _as_problem(error, request, admin=admin)
    _record_refusal(problem, request)
    _discard_rest(request, problem)
    return problem.response()


def _discard_rest(request: web.Request, problem: Problem) -> None:
    """Discard the rest of the body slowly if the body is larger than a heartbeat and the request has no valid key."""
    connection, length = request.protocol, request.content_length
    is_small = length is not None and length <= request.app[DEVICE_API].settings.server.body_max_bytes
    if not isinstance(connection, HttpConnection) or connection.is_authenticated:
        return
    if not is_small and not request.content.is_eof():
        problem.close = True
        connection.slow_down()


def _as_problem(error: Exception, request: web.Request, *, admin: bool) -> Problem:
    """Return the problem for an exception of a handler. Only with the admin key does it have PostgreSQL's message."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownDevice | UnknownSite):
        return Problem(404, str(error))
    if isinstance(error, SiteInUse):
        return Problem(409, str(error))
    if isinstance(error, BadInput):
        return Problem(422, str(error), errors=[FieldError(error.field, error.detail)] if error.field else ())
    if is_unavailable(error):
        unavailability = request.app[DEVICE_API].unavailability
        detail = str(error) or type(error).__name__
        return unavailability.retry_later(detail) if admin else unavailability.because_of(error)
    _log.error("http.unexpected", method=request.method, path=request.path, exc_info=error)
    return Problem(500, "An unexpected error occurred; see the log.")


def _record_refusal(problem: Problem, request: web.Request) -> None:
    """Record that the device whose token the request carries was refused or rate limited."""
    device = request.get(DEVICE)
    if device is not None and problem.status < 500:
        first = problem.errors[0] if problem.errors else None
        reason = f"{problem.detail} {first.message}" if first else problem.detail
        request.app[DEVICE_API].troubles.refused(device, problem.status, reason, (first and first.path) or None)


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Respond to `Expect: 100-continue`, or refuse any other value without repeating it (aiohttp's own refusal fails if
    it cannot encode the value)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return Problem(417, "Expect must be 100-continue.", close=True).response()
    if request.version >= HttpVersion11:  # an older client would mistake this response for the final one
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def _no_such_route(request: web.Request) -> web.StreamResponse:
    allowed: set[str] = set()
    path = ""  # the first that matches: /v1/devices/offline is not a device
    for resource in request.app.router.resources():
        for route in resource:
            if route.method not in ("*", request.method) and (await resource.resolve(request))[1]:
                path = path or resource.canonical
                allowed |= {route.method} if resource.canonical == path else set()
    if allowed:
        raise Problem(
            405,
            f"{request.path} accepts {', '.join(sorted(allowed))}.",
            headers={"Allow": ", ".join(sorted(allowed))},
        )
    raise Problem(404, "This path does not exist.")
