"""The operators' calls about sites."""

from __future__ import annotations

import msgspec
from aiohttp import web

from nexhb.devices import sites
from nexhb.devices.sites import Site
from nexhb.http.operator_api import silenced
from nexhb.http.operator_api.context import OPERATOR_API
from nexhb.http.transport import body, query
from nexhb.http.transport.problem import SERVER, json_response

MAX_PAGE = 1_000


class _SiteRequest(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    zone: str = "UTC"
    hours: str | None = None


async def get_sites(request: web.Request) -> web.Response:
    """Return a page of sites. `next` is the `after` of the following page, null on the last one."""
    api = request.app[OPERATOR_API]
    limit = query.number(request, "limit", 100, 1, MAX_PAGE)
    found = await api.reads.sites(query.text(request, "after"), limit + 1)
    shown = await silenced.shown_sites(api, found[:limit], api.now())
    return json_response({"sites": shown, "next": shown[-1]["site"] if len(found) > limit else None})


async def get_site(request: web.Request) -> web.Response:
    """Return one site."""
    api = request.app[OPERATOR_API]
    site = await api.reads.site(request.match_info["site"])
    [shown] = await silenced.shown_sites(api, [site], api.now())
    return json_response(shown)


async def put_site(request: web.Request) -> web.Response:
    """Create a site, or replace all of it."""
    api = request.app[OPERATOR_API]
    wanted = await body.read_object(request, _SiteRequest, timeout_s=api.settings.server.body_timeout_seconds)
    site = Site(request.match_info["site"], wanted.name, wanted.zone, wanted.hours)
    site.check()  # before a connection is opened
    async with api.changes.connection() as conn:
        is_new = await sites.put(conn, site)
        stored = await sites.get(conn, site.site)
    [shown] = await silenced.shown_sites(api, [stored], api.now())
    return json_response(shown, 201 if is_new else 200)


async def delete_site(request: web.Request) -> web.Response:
    """Remove a site that has no devices."""
    async with request.app[OPERATOR_API].changes.connection() as conn:
        await sites.remove(conn, request.match_info["site"])
    return web.Response(status=204, headers=SERVER)
