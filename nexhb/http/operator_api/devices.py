"""The operators' changes of devices."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from nexhb.devices import registry
from nexhb.http.operator_api import fleet
from nexhb.http.operator_api.context import OPERATOR_API
from nexhb.http.transport import body


class _DeviceRequest(msgspec.Struct, forbid_unknown_fields=True):
    site: str | UnsetType | None = UNSET
    tags: list[str] | UnsetType = UNSET
    name: str | UnsetType | None = UNSET


async def patch_device(request: web.Request) -> web.Response:
    """Change the site, the tags or the name of a device, and return the device."""
    api = request.app[OPERATOR_API]
    wanted = await body.read_object(request, _DeviceRequest, timeout_s=api.settings.server.body_timeout_seconds)
    values: dict[str, Any] = {
        field: value for field, value in msgspec.structs.asdict(wanted).items() if value is not UNSET
    }
    async with api.changes.connection() as conn:
        await registry.change(conn, fleet.device_id_of(request), values)
    return await fleet.get_device(request)
