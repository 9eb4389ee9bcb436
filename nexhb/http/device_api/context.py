"""The objects that the handlers of devices' requests use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from aiohttp import web

from nexhb.config import Settings
from nexhb.devices.store import DeviceStore
from nexhb.devices.troubles import Troubles
from nexhb.http.changes import Changes
from nexhb.http.credentials import WrongKeys
from nexhb.http.device_api import backpressure
from nexhb.http.transport.prebuilt_response import PrebuiltResponse
from nexhb.http.unavailability import Unavailability
from nexhb.ingest.intake import Intake
from nexhb.ingest.parser import HeartbeatRules
from nexhb.nexmdm.adoption import Adoption
from nexhb.postgres.identity import DatabaseTracker
from nexhb.rate_limit import RateLimiter


@dataclass(frozen=True)
class DeviceApi:
    """The objects that handlers find in the application under DEVICE_API."""

    settings: Settings
    now: Callable[[], datetime]  # UTC
    devices: DeviceStore
    adoption: Adoption
    tracker: DatabaseTracker  # detects that the database was replaced
    intake: Intake
    troubles: Troubles
    wrong_keys: WrongKeys
    unavailability: Unavailability
    changes: Changes
    rules: HeartbeatRules
    device_rate: RateLimiter  # limits the heartbeats of each device_no
    refusal_pacer: backpressure.RefusalPacer  # delays the 503 responses while the intake is full
    queues: set[object] = field(default_factory=set)  # requests to POST /v1/heartbeats in progress
    # The 200 responses, by interval and by whether the heartbeat was a duplicate; a few hundred at most.
    responses: dict[tuple[int, bool], PrebuiltResponse] = field(default_factory=dict)
    mismatch_logged: set[int] = field(default_factory=set)  # device_no of devices that sent a foreign device_id

    @classmethod
    def create(
        cls,
        settings: Settings,
        now: Callable[[], datetime],
        *,
        devices: DeviceStore,
        adoption: Adoption,
        tracker: DatabaseTracker,
        intake: Intake,
        troubles: Troubles,
        wrong_keys: WrongKeys,
        unavailability: Unavailability,
        changes: Changes,
    ) -> Self:
        """Return the context, with the objects that depend only on the settings."""
        ingest = settings.ingest
        device_rate = RateLimiter(burst=ingest.device_burst, per_second=ingest.device_per_minute / 60)
        tracker.on_change(device_rate.clear)  # in the new database, the same device has another device_no
        return cls(
            settings=settings, now=now, devices=devices, adoption=adoption, tracker=tracker, intake=intake,
            troubles=troubles, wrong_keys=wrong_keys, unavailability=unavailability, changes=changes,
            rules=HeartbeatRules(
                settings.heartbeat.unity_package, ingest.bucket_seconds, ingest.accept_past, ingest.accept_future
            ),
            device_rate=device_rate,
            refusal_pacer=backpressure.RefusalPacer(
                per_s=backpressure.REFUSALS_PER_S,
                at_once=backpressure.REFUSALS_AT_ONCE,
                within_s=backpressure.REFUSAL_WITHIN_S,
            ),
        )  # fmt: skip


DEVICE_API: web.AppKey[DeviceApi] = web.AppKey("device_api", DeviceApi)
