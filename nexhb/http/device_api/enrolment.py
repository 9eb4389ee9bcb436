"""POST /v1/register: a device registers itself with an enrolment key."""

from __future__ import annotations

import msgspec
from aiohttp import web

from nexhb import log
from nexhb.devices import enrolment
from nexhb.errors import DeviceExists, EnrolmentRefused
from nexhb.http.credentials import bearer
from nexhb.http.device_api.context import DEVICE_API, DeviceApi
from nexhb.http.transport import body, query
from nexhb.http.transport.problem import Problem, json_response

_log = log.get("enrolment")
MAX_BODY_BYTES = 4_096
MAX_ALIAS_LENGTH = 200


class _Registration(msgspec.Struct):
    device_id: str | None = None
    alias: str | None = None


async def post_register(request: web.Request) -> web.Response:
    """Add a device, and return its device_id and its token, which is shown only this once.

    The NexMDM agent sends its configured key as X-Admin-Key with the alias in the body, or as X-Admin with the alias in
    the query and without a body. It reads device_id and device_token of a response with status 200.
    """
    api = request.app[DEVICE_API]
    if api.settings.auth.enrolment != "open":
        raise Problem(403, "Only the operator can add devices (auth.enrolment is token).")
    api.wrong_keys.reject_guessing(request)
    key = _key(request)
    if not key:
        raise api.wrong_keys.problem(request, "enrolment", "An enrolment key is required: Authorization: Bearer …")
    alias_in_query = query.text(request, "alias", MAX_ALIAS_LENGTH)
    registration = await _read_registration(request, api)
    alias = registration.alias or alias_in_query or None
    async with api.changes.connection() as conn:
        try:
            device_id, token = await enrolment.enrol(conn, key, registration.device_id or None, alias, api.now())
        except EnrolmentRefused as error:
            raise api.wrong_keys.problem(request, "enrolment", str(error)) from None
        except DeviceExists as error:
            raise Problem(409, str(error)) from None
    _log.info("device.enrolled", device_id=device_id)
    return json_response({"device_id": device_id, "device_token": token})


def _key(request: web.Request) -> str:
    """Return the enrolment key of the request, or ''. The agent sends it in the headers of NexMDM's admin key."""
    headers = request.headers
    return bearer(request) or headers.get("X-Admin-Key", "") or headers.get("X-Admin", "")


async def _read_registration(request: web.Request, api: DeviceApi) -> _Registration:
    body.check_headers(request, max_bytes=MAX_BODY_BYTES, types=("application/json",))
    raw = await body.read(request, max_bytes=MAX_BODY_BYTES, timeout_s=api.settings.server.body_timeout_seconds)
    try:
        return msgspec.json.decode(raw or b"{}", type=_Registration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The registration is not valid: {error}") from None
