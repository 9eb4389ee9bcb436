"""Authenticate a device by the token of its request."""

from __future__ import annotations

from aiohttp import web

from nexhb import metrics
from nexhb.devices.store import Device
from nexhb.devices.tokens import hash_token
from nexhb.errors import DatabaseUnavailable
from nexhb.http.credentials import bearer, mark_authenticated
from nexhb.http.device_api import adoption
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.transport.problem import Problem
from nexhb.nexmdm.adoption import TokenStatus

DEVICE: web.RequestKey[Device] = web.RequestKey("device", Device)  # the sender: its token is in the request


async def authenticate(request: web.Request, api: DeviceApi) -> Device:
    """Return the device that the token of the request belongs to. Raise a Problem: 401 only if the token store was read
    and does not have the token, 410 for a revoked device, 503 if the store could not be read or the database is an
    older copy of itself, 429 for an address that sent too many wrong keys."""
    token = bearer(request)
    if not token:
        raise api.wrong_keys.problem(request, "device", "A device token is required: Authorization: Bearer …")
    token_hash = hash_token(token)
    device = api.devices.cached(token_hash)
    if device is None:
        api.wrong_keys.reject_guessing(request)
        epoch = api.tracker.epoch
        try:
            device = await api.devices.look_up(token_hash)
            if device is None:
                device = await _adopted_device(request, api, token, token_hash)
            api.tracker.require_epoch(epoch)
        except DatabaseUnavailable as error:
            raise api.unavailability.because_of(error) from error
    if device is None and api.tracker.older_copy:
        raise _possibly_lost(request, api)
    if device is None:
        raise api.wrong_keys.problem(request, "device", "This device token is unknown.")
    request[DEVICE] = device
    if device.revoked:
        metrics.unauthorized.labels(kind="revoked").inc()
        raise Problem(410, "This device was revoked.")
    mark_authenticated(request)
    return device


async def _adopted_device(request: web.Request, api: DeviceApi, token: str, token_hash: bytes) -> Device | None:
    """Return the device that was adopted from NexMDM with this token, or None if NexMDM does not know the token. Raise
    a 503 Problem while the look-up has not ended, and DatabaseUnavailable."""
    status = await adoption.status_of(request, api, token, token_hash)
    if status is TokenStatus.ADOPTED:
        api.devices.forget_miss(token_hash)
        return await api.devices.look_up(token_hash)
    if status is not TokenStatus.UNKNOWN:
        raise _lookup_pending(request, api)
    return None


def _lookup_pending(request: web.Request, api: DeviceApi) -> Problem:
    """Return the 503 for a token that is still being looked up in NexMDM's data. The request is counted like a wrong
    key: both cost a look-up and perhaps a bcrypt hash, and a later 429 harms a device no more than a 503."""
    api.wrong_keys.count(request)
    return Problem(503, "The token is still being looked up.", headers={"Retry-After": "5"})


def _possibly_lost(request: web.Request, api: DeviceApi) -> Problem:
    """Return the 503 for an unknown token while the database is an older copy: the device may have been added, or its
    token changed, since the copy was made. The request is counted like a wrong key."""
    metrics.unauthorized.labels(kind="lost").inc()
    api.wrong_keys.count(request)
    return api.unavailability.retry_later(f"This device token is unknown. {api.tracker.older_copy}")
