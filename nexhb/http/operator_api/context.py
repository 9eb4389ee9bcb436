"""The objects that the handlers of operators' requests use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from nexhb.config import Settings
from nexhb.devices.troubles import Troubles
from nexhb.http.changes import Changes
from nexhb.http.operator_api.admin_key import AdminKey
from nexhb.ingest.intake import Intake
from nexhb.jobs.registry import Jobs
from nexhb.messages.channels import Channels
from nexhb.nexmdm.adoption import Adoption
from nexhb.postgres.identity import DatabaseTracker
from nexhb.readiness import Readiness
from nexhb.reading.comparison import PerfDiff
from nexhb.reading.events import EventReads
from nexhb.reading.flags import FlagStore
from nexhb.reading.following import Follower
from nexhb.reading.reads import PooledReader, Reads
from nexhb.watching.uptime_reads import UptimeReads


@dataclass(frozen=True)
class OperatorApi:
    """The objects that handlers find in the application under OPERATOR_API."""

    settings: Settings
    now: Callable[[], datetime]  # UTC
    admin_key: AdminKey
    changes: Changes
    channels: Channels
    reads: Reads
    history_reads: PooledReader
    events: EventReads
    uptime: UptimeReads
    follower: Follower
    perf_diff: PerfDiff
    flags: FlagStore
    troubles: Troubles
    jobs: Jobs
    readiness: Readiness
    tracker: DatabaseTracker  # detects that the database was replaced
    adoption: Adoption  # /readyz shows its problem
    intake: Intake  # /metrics shows its metrics
    next_heartbeat_s: Callable[[], int]  # /metrics shows the interval that devices are asked to keep


OPERATOR_API: web.AppKey[OperatorApi] = web.AppKey("operator_api", OperatorApi)
