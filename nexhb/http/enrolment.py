"""POST /v1/register: a device that registers itself with an enrolment key."""

from __future__ import annotations

import msgspec
from aiohttp import web

from nexhb import devices, log
from nexhb.errors import DeviceExists, EnrolmentRefused
from nexhb.http import auth, body, query
from nexhb.http.parts import PARTS, Parts, writable_connection
from nexhb.http.problem import Problem, answer

_log = log.get("enrolment")
BODY_MOST = 4_096
ALIAS_LONGEST = 200


class _Registration(msgspec.Struct):
    device_id: str | None = None
    alias: str | None = None


async def post_register(request: web.Request) -> web.Response:
    """Add a device and answer its device_id and token, which is shown this once.

    The NexMDM agent sends the key that it was configured with as X-Admin-Key and the alias in the body, or as X-Admin
    and the alias in the query, without a body. It reads device_id and device_token of an answer 200.
    """
    parts = request.app[PARTS]
    if parts.settings.auth.enrolment != "open":
        raise Problem(403, "Devices are added by the operator here (auth.enrolment is token).")
    auth.hold_off_guessing(request, parts)
    key = _key(request)
    if not key:
        raise auth.wrong_key(request, parts, "enrolment", "An enrolment key is required: Authorization: Bearer …")
    in_query = query.text(request, "alias", ALIAS_LONGEST)
    wanted = await _wanted(request, parts)
    alias = wanted.alias or in_query or None
    async with writable_connection(parts) as conn:
        try:
            device_id, token = await devices.enrol(conn, key, wanted.device_id or None, alias, parts.now())
        except EnrolmentRefused as error:
            raise auth.wrong_key(request, parts, "enrolment", str(error)) from None
        except DeviceExists as error:
            raise Problem(409, str(error)) from None
    _log.info("device.enrolled", device_id=device_id)
    return answer({"device_id": device_id, "device_token": token})


def _key(request: web.Request) -> str:
    """The enrolment key of the request, or ''. The agent has no other name for it than the admin key of NexMDM."""
    headers = request.headers
    return auth.bearer(request) or headers.get("X-Admin-Key", "") or headers.get("X-Admin", "")


async def _wanted(request: web.Request, parts: Parts) -> _Registration:
    body.check_headers(request, most=BODY_MOST, types=("application/json",))
    raw = await body.read(request, most=BODY_MOST, timeout_s=parts.settings.server.body_timeout_seconds)
    try:
        return msgspec.json.decode(raw or b"{}", type=_Registration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The registration is not valid: {error}") from None
