"""All routes in one block, each with its key, its time as a metric and its errors as problem details."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import HttpVersion11, web

from nexhb import log, metrics
from nexhb.errors import BadInput, UnknownDevice
from nexhb.http import auth, enrolment, fleet, heartbeats, ops, queues
from nexhb.http.connections import Guarded
from nexhb.http.parts import PARTS, Parts
from nexhb.http.problem import Problem
from nexhb.http.query import check as check_query
from nexhb.pgerrors import is_unavailable

_log = log.get("http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """One call. `query` names the parameters that it takes; any other is refused."""

    method: str
    path: str
    handler: Handler
    key: str  # whose: device, enrolment, admin or none
    query: tuple[str, ...] = ()


ROUTES = (
    Route("POST", "/v1/heartbeat", heartbeats.post_heartbeat, "device"),
    Route("POST", "/v1/heartbeats", queues.post_heartbeats, "device"),
    Route("POST", "/v1/register", enrolment.post_register, "enrolment", ("alias",)),
    Route("GET", "/v1/fleet", fleet.get_fleet, "admin"),
    Route("GET", "/v1/devices", fleet.get_devices, "admin", ("limit", "after")),
    Route("GET", "/v1/devices/offline", fleet.get_offline, "admin", ("minutes", "limit", "after")),
    Route("GET", "/v1/devices/unity-down", fleet.get_unity_down, "admin", ("limit", "after")),
    Route("GET", "/v1/devices/{device_id}", fleet.get_device, "admin"),
    Route("GET", "/v1/devices/{device_id}/heartbeats", fleet.get_history, "admin", ("from", "to", "limit", "after")),
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


def make_app(parts: Parts) -> web.Application:
    """The application. Bodies are bounded by their handlers, so aiohttp's own limit is the larger of theirs.

    HEAD is taken wherever GET is. Each path is taken with a second slash before it as well: an agent whose server_url
    ends in a slash sends to //v1/heartbeat.
    """
    app = web.Application(client_max_size=parts.settings.server.batch_body_max_bytes)
    app[PARTS] = parts
    for route in ROUTES:
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            handler = _wrapped(route.path, method, route.handler, admin=route.key == "admin", query=route.query)
            for path in (route.path, f"/{route.path}"):
                app.router.add_route(method, path, handler, expect_handler=_expect)
    other = _wrapped("other", "other", _no_such_route, admin=False, query=None)
    app.router.add_route("*", "/{tail:.*}", other, expect_handler=_expect)
    return app


def _wrapped(route: str, method: str, handler: Handler, *, admin: bool, query: tuple[str, ...] | None) -> Handler:
    """The handler with its key, its parameters, its time and its errors. No middleware: aiohttp would build a chain of
    them for every request."""
    observe = metrics.http_request_latency_ms.series(route, method)

    async def call(request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        try:
            if admin:
                auth.check_admin(request, request.app[PARTS])
            if query is not None:
                check_query(request, query)
            response = await handler(request)
        except Exception as error:
            # In a function of its own: the problem's traceback holds this frame, which must not hold the problem.
            response = _refusal(error, request, admin=admin)
        except asyncio.CancelledError:
            observe(499, time.perf_counter() - started)
            raise
        observe(response.status, time.perf_counter() - started)
        return response

    return call


def _refusal(error: Exception, request: web.Request, *, admin: bool) -> web.Response:
    problem = _as_problem(error, request, admin=admin)
    _note_refusal(problem, request)
    _leave_the_rest(request, problem)
    return problem.response()


def _leave_the_rest(request: web.Request, problem: Problem) -> None:
    """What is still to come of a body larger than a heartbeat, of somebody who showed no valid key."""
    line, length = request.protocol, request.content_length
    small = length is not None and length <= request.app[PARTS].settings.server.body_max_bytes
    if isinstance(line, Guarded) and not line.is_proven and not small and not request.content.is_eof():
        problem.close = True
        line.slow_down()


def _as_problem(error: Exception, request: web.Request, *, admin: bool) -> Problem:
    """The one rim at which exceptions become answers; the database's own words are for who showed the admin key."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownDevice | BadInput):
        return Problem(404 if isinstance(error, UnknownDevice) else 422, str(error))
    if is_unavailable(error):
        parts = request.app[PARTS]
        return parts.come_back(str(error) or type(error).__name__) if admin else parts.unavailable(error)
    _log.error("http.unexpected", method=request.method, path=request.path, exc_info=error)
    return Problem(500, "An unexpected error; it is in the log.")


def _note_refusal(problem: Problem, request: web.Request) -> None:
    """Who was refused or limited: the device whose token the request carries."""
    device = request.get(auth.DEVICE)
    if device is not None and problem.status < 500:
        first = problem.errors[0] if problem.errors else None
        reason = f"{problem.detail} {first.message}" if first else problem.detail
        request.app[PARTS].troubles.refused(device, problem.status, reason, (first and first.path) or None)


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """`Expect: 100-continue`, or a refusal that repeats nothing (aiohttp's own could not encode what it repeats)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return Problem(417, "Expect takes 100-continue.", close=True).response()
    if request.version >= HttpVersion11:  # before it nobody knew such an answer, and it would be taken for the last
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def _no_such_route(request: web.Request) -> web.StreamResponse:
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        for route in resource:
            if route.method not in ("*", request.method) and (await resource.resolve(request))[1]:
                allowed.add(route.method)
    if allowed:
        raise Problem(
            405,
            f"{request.path} takes {', '.join(sorted(allowed))}.",
            headers={"Allow": ", ".join(sorted(allowed))},
        )
    raise Problem(404, "There is nothing here.")
