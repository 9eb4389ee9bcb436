"""The operators' calls about messages: silences, acknowledgements, test messages."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from nexhb.errors import BadInput, DeliveryFailed
from nexhb.http.operator_api.context import OPERATOR_API
from nexhb.http.transport import body, query
from nexhb.http.transport.client import address_of
from nexhb.http.transport.problem import SERVER, Problem, json_response
from nexhb.messages import silences, telling
from nexhb.messages.channels import message_for_test
from nexhb.messages.silences import Silence
from nexhb.texts import unfit

MAX_LIST = 1_000

Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class _SilenceRequest(msgspec.Struct, forbid_unknown_fields=True):
    scope: Literal["fleet", "site", "tag", "device"]
    reason: str
    value: str | UnsetType = UNSET
    start: Moment | UnsetType = msgspec.field(default=UNSET, name="from")
    until: Moment | UnsetType = UNSET
    hours: str | UnsetType = UNSET
    zone: str | UnsetType = UNSET
    created_by: str | UnsetType = UNSET


async def get_silences(request: web.Request) -> web.Response:
    """Return a page of silences; with `all` also those that have ended."""
    api = request.app[OPERATOR_API]
    limit, after = query.number(request, "limit", 100, 1, MAX_LIST), query.number(request, "after", 0, 0, 10**12 - 1)
    now = api.now()
    async with api.changes.connection() as conn:
        rows = await silences.listed(conn, None if query.boolean(request, "all") else now, after, limit + 1)
    shown = [_shown(row, now) for row in rows[:limit]]
    return json_response({"silences": shown, "next": shown[-1]["silence_id"] if len(rows) > limit else None})


def _shown(row: dict[str, Any], now: datetime) -> dict[str, Any]:
    return row | {"active": silences.is_active(row, now)}


async def post_silence(request: web.Request) -> web.Response:
    """Add a silence."""
    api = request.app[OPERATOR_API]
    wanted = await body.read_object(request, _SilenceRequest, timeout_s=api.settings.server.body_timeout_seconds)
    _check_text(wanted.reason, "reason", 500)
    _check_text(wanted.value, "value", 100)
    now = api.now()
    silence = Silence(
        wanted.scope, wanted.value or None, wanted.start or now, wanted.until or None,
        None if wanted.hours is UNSET else wanted.hours, "UTC" if wanted.zone is UNSET else wanted.zone,
        wanted.reason, _by(request, wanted.created_by, "created_by"),
    )  # fmt: skip
    async with api.changes.connection() as conn:
        row = await silences.add(conn, silence, now)
    return json_response(_shown(row, now), 201)


async def delete_silence(request: web.Request) -> web.Response:
    """Remove a silence."""
    silence_id = _number(request, "silence_id")
    async with request.app[OPERATOR_API].changes.connection() as conn:
        if silence_id is None or not await silences.remove(conn, silence_id):
            raise Problem(404, "The silence is unknown.")
    return web.Response(status=204, headers=SERVER)


class _AckRequest(msgspec.Struct, forbid_unknown_fields=True):
    by: str | UnsetType = UNSET


async def post_ack(request: web.Request) -> web.Response:
    """Acknowledge an incident: its reminders stop. The first acknowledgement counts."""
    api, incident_id = request.app[OPERATOR_API], _number(request, "incident_id")
    wanted = await body.read_object(request, _AckRequest, timeout_s=api.settings.server.body_timeout_seconds)
    by = _by(request, wanted.by, "by")
    async with api.changes.connection() as conn:
        row = None if incident_id is None else await telling.acknowledge(conn, incident_id, api.now(), by)
    if row is None:
        raise Problem(404, "The incident is unknown.")
    return json_response(row)


async def post_test(request: web.Request) -> web.Response:
    """Send a test message on a route at once, and return the result."""
    api = request.app[OPERATOR_API]
    route = api.channels.routes.get(request.match_info["route"])
    if route is None:
        raise Problem(404, "The route is unknown: the daemon's notify.routes does not have it.")
    message = message_for_test(api.now())
    error = None
    try:
        await api.channels.send(route, message)
    except DeliveryFailed as failure:
        error = failure.detail
    return json_response({"route": route.name, "id": message.message_id, "delivered": error is None, "error": error})


def _by(request: web.Request, name: str | UnsetType, field: str) -> str:
    """Return who makes the change: the name in the body, else the address of the client."""
    _check_text(name, field, 100)
    return name or address_of(request, request.app[OPERATOR_API].settings.server.trusted_proxies)


def _check_text(value: str | UnsetType, field: str, max_chars: int) -> None:
    if value is not UNSET and not (1 <= len(value) <= max_chars and value.strip() and not unfit(value)):
        raise BadInput(f"{field} takes 1 to {max_chars} printable characters.", field=field)


def _number(request: web.Request, name: str) -> int | None:
    """Return the number in the path, or None if the path has no valid number; nothing has the number None."""
    text = request.match_info[name]
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None
