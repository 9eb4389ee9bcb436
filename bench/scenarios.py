"""The scenarios as data: what is sent, and what must hold. Runners live elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bench.report import ALL_ACKNOWLEDGED, Limit

# floors: below them the service would be called broken, whatever else it does well
FLOORS: Final = (Limit("p95 below 150 ms", "p95_ms", 150), Limit("p99 below 300 ms", "p99_ms", 300))


@dataclass(frozen=True, slots=True)
class OpenLoopScenario:
    """A fleet on its schedule."""

    number: int
    name: str
    devices: int
    interval_s: float
    jitter_s: float
    duration_s: float
    limits: tuple[Limit, ...]
    duplicate_factor: float = 1.0
    replay_fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class OfflineQueryScenario:
    """GET /v1/devices/offline from device_last_status against the legacy query over a day of history."""

    number: int
    name: str
    devices: int
    history_rows: int
    minutes: int
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class ReconnectScenario:
    """All devices back at once, each with a queue to drain, oldest first."""

    number: int
    name: str
    devices: int
    interval_s: float
    queue: int
    within_s: float
    bound_s: float
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class ClosedLoopScenario:
    """As fast as it goes, against a peer that keeps nothing."""

    number: int
    name: str
    devices: int
    connections: int
    duration_s: float
    warm_s: float
    limits: tuple[Limit, ...]


STEADY_500: Final = OpenLoopScenario(
    number=1,
    name="500 devices at 60 s",
    devices=500,
    interval_s=60,
    jitter_s=0,
    duration_s=60,
    limits=(*ALL_ACKNOWLEDGED, *FLOORS),
)
STEADY_2000: Final = OpenLoopScenario(
    number=2,
    name="2,000 devices at 60 s ± 15 s",
    devices=2000,
    interval_s=60,
    jitter_s=15,
    duration_s=60,
    limits=(
        *ALL_ACKNOWLEDGED,
        *FLOORS,
        Limit("p50 at most 3 ms", "p50_ms", 3),
        Limit("p99 at most 20 ms", "p99_ms", 20),
    ),
)
OFFLINE_QUERY: Final = OfflineQueryScenario(
    number=3,
    name="offline query, fast against legacy",
    devices=500,
    history_rows=720_000,
    minutes=10,
    limits=(),
)
RECONNECT: Final = ReconnectScenario(
    number=4,
    name="2,000 devices back within a second, 30 heartbeats each",
    devices=2000,
    interval_s=60,
    queue=30,
    within_s=1,
    bound_s=120,
    # refusals are the server's right here: the agent comes again; what counts is that nothing is left
    limits=(
        Limit("every heartbeat acknowledged", "left", 0),
        Limit("no queue overflowed", "dropped", 0),
        Limit("something was acknowledged", "ok", 1, "at_least"),
    ),
)
AS_FAST_AS_IT_GOES: Final = ClosedLoopScenario(
    number=5,
    name="as fast as it goes, against a bare aiohttp handler",
    devices=2000,
    connections=256,
    duration_s=20,
    warm_s=4,
    limits=(*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0)),
)

SCENARIOS: Final = (STEADY_500, STEADY_2000, OFFLINE_QUERY, RECONNECT, AS_FAST_AS_IT_GOES)
