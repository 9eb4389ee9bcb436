"""The scenarios as data: what is sent, and what must hold. `bench/runs/` runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from bench.report import ALL_ACKNOWLEDGED, Limit

# floors: below them the service would be called broken, whatever else it does well
FLOORS: Final = (Limit("p95 below 150 ms", "p95_ms", 150), Limit("p99 below 300 ms", "p99_ms", 300))
MEMORY: Final = Limit("daemon below 120 MB", "daemon_rss_mb", 120)


@dataclass(frozen=True, slots=True)
class OpenLoopScenario:
    """A fleet on its schedule."""

    name: str
    title: str
    devices: int
    interval_s: float
    jitter_s: float
    duration_s: float
    limits: tuple[Limit, ...]
    duplicate_factor: float = 1.0

    def quicker(self) -> OpenLoopScenario:
        """The same rate for a shorter time."""
        return replace(self, duration_s=min(15.0, self.duration_s))


@dataclass(frozen=True, slots=True)
class OfflineQueryScenario:
    """Offline and unity-down from device_last_status against the legacy queries over a day of history."""

    name: str
    title: str
    devices: int
    beats: int
    interval_s: int
    offline_share: float
    minutes: int
    legacy_rounds: int
    # of the fast query in each round, between two of the legacy one
    fast_per_round: int
    http_requests: int

    def quicker(self) -> OfflineQueryScenario:
        """A quarter of the history."""
        return replace(self, beats=self.beats // 4, http_requests=200)


@dataclass(frozen=True, slots=True)
class ReconnectScenario:
    """All devices back at once, each with a queue to drain, oldest first."""

    name: str
    title: str
    devices: int
    interval_s: float
    queue: int
    within_s: float
    bound_s: float
    limits: tuple[Limit, ...]

    def quicker(self) -> ReconnectScenario:
        """Shorter queues."""
        return replace(self, queue=10)


@dataclass(frozen=True, slots=True)
class CeilingScenario:
    """As fast as it goes, against a peer that keeps nothing."""

    name: str
    title: str
    devices: int
    # each tried once, for both servers, and shown
    connections: tuple[int, ...]
    # the one that the rounds and the verdict use
    judged_at: int
    trial_s: float
    rounds: int
    round_s: float
    warm_s: float
    ratio: Limit

    def quicker(self) -> CeilingScenario:
        """Shorter rounds."""
        return replace(self, round_s=3.0, warm_s=1.0, trial_s=1.5)


@dataclass(frozen=True, slots=True)
class KillScenario:
    """A fleet of agents on its schedule; the daemon is killed at a third of it and started again."""

    name: str
    title: str
    devices: int
    interval_s: float
    jitter_s: float
    duration_s: float
    # after the schedule's end, for what agents still hold: their waits grow to many seconds
    drain_s: float
    limits: tuple[Limit, ...]

    def quicker(self) -> KillScenario:
        """The same rate for a shorter time."""
        return replace(self, duration_s=20.0)


@dataclass(frozen=True, slots=True)
class ArchiveScenario:
    """An old day archived under a fleet's load, and another one alone, beside a pipe that does the same."""

    name: str
    title: str
    devices: int
    # heartbeats of each device in the old day
    beats: int
    interval_s: float
    jitter_s: float
    # load before the nightly run, for the daemon's memory and the latency without it, and after it
    before_s: float
    after_s: float
    # longest that the load lasts
    most_s: float
    limits: tuple[Limit, ...]
    growth: Limit
    p99: Limit
    ratio: Limit

    def quicker(self) -> ArchiveScenario:
        """A tenth of the day."""
        return replace(self, beats=max(1, self.beats // 10), before_s=10.0)


@dataclass(frozen=True, slots=True)
class ReaderScenario:
    """A nightly run with a long reader in its way, under a fleet's load, and one without."""

    name: str
    title: str
    devices: int
    # heartbeats of each device in the old day
    beats: int
    # missing days ahead
    days_made: int
    interval_s: float
    jitter_s: float
    before_s: float
    # shortest that the reader's transaction lasts; it lasts as long as the nightly run in any case
    read_s: float
    after_s: float
    most_s: float
    most_ms: float
    limits: tuple[Limit, ...]

    def quicker(self) -> ReaderScenario:
        """Less before and after."""
        return replace(self, before_s=2.0, after_s=1.0)


@dataclass(frozen=True, slots=True)
class OverloadScenario:
    """A rate that nobody can take, between two stretches of one that is easy."""

    name: str
    title: str
    devices: int
    # of the generator; more than the queue takes, or nothing would ever be refused
    connections: int
    queue_items: int
    # as fast as it goes, to know what the machine takes
    capacity_s: float
    # of what it takes
    normal: float
    times: float
    before_s: float
    overload_s: float
    after_s: float
    # of a second of full service
    calm_ms: float
    limits: tuple[Limit, ...]

    def quicker(self) -> OverloadScenario:
        """A shorter one."""
        return replace(self, before_s=5.0, overload_s=15.0, after_s=15.0)


@dataclass(frozen=True, slots=True)
class OutageScenario:
    """Agents, and a database that is away for minutes."""

    name: str
    title: str
    devices: int
    interval_s: float
    jitter_s: float
    before_s: float
    outage_s: float
    # heartbeats go on for so long after it
    after_s: float
    # and nothing is waited for any longer than this: an agent's longest wait is 375 s
    drain_s: float
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class IdleScenario:
    """Connections that say nothing after one request, beside a fleet."""

    name: str
    title: str
    connections: int
    devices: int
    interval_s: float
    duration_s: float
    # wait for the daemon to close them
    until_closed: bool
    limits: tuple[Limit, ...]
    cut: Limit
    memory: Limit


@dataclass(frozen=True, slots=True)
class CompareScenario:
    """nexhb beside floors and peers, in rounds that alternate."""

    name: str
    title: str
    devices: int
    # the fleet on its schedule, for the latency
    steady: OpenLoopScenario
    # single heartbeats: each number of connections is tried once on nexhb and on the bare handler, and shown; each of
    # the two is judged at its own best
    connections: tuple[int, ...]
    trial_s: float
    rounds: int
    round_s: float
    warm_s: float
    # FastAPI: each pool and each number of connections is tried once, and the best counts
    pools: tuple[int, ...]
    peer_connections: tuple[int, ...]
    peer_s: float
    # NexMDM with bcrypt: a hash takes a quarter of a second, to make and to check
    hashed_devices: int
    hashed_connections: int
    hashed_s: float
    # POST /v1/heartbeats
    batch_connections: tuple[int, ...]
    batch_s: float
    copy_rows: tuple[int, ...]
    # heartbeats/s of 20,000 and 500,000 devices at 60 s
    rates: tuple[float, float]
    rate_s: float
    rate_connections: int

    def quicker(self) -> CompareScenario:
        """One round, and each of them shorter."""
        return replace(
            self,
            steady=self.steady.quicker(),
            trial_s=1.5,
            rounds=1,
            round_s=3.0,
            warm_s=0.7,
            pools=self.pools[1:2],
            peer_connections=self.peer_connections[1:2],
            peer_s=2.5,
            hashed_devices=8,
            hashed_s=4.0,
            batch_connections=self.batch_connections[:1],
            batch_s=3.0,
            rate_s=6.0,
        )


@dataclass(frozen=True, slots=True)
class CurveScenario:
    """Fleets of four sizes, each at its rate and each known to the daemon to the last token, and the ceiling."""

    name: str
    title: str
    fleets: tuple[int, ...]
    interval_s: float
    # at the rate before the window counts
    settle_s: float
    window_s: float
    connections: int
    # of the closed loop, in which every device is heard once beforehand; and of the ceiling
    first_connections: int
    ceiling_devices: int
    ceiling_connections: int
    # else only those that send in the window are heard beforehand
    all_heard: bool

    def quicker(self) -> CurveScenario:
        """Short windows."""
        return replace(self, settle_s=1.0, window_s=5.0, all_heard=False)


@dataclass(frozen=True, slots=True)
class StatusScenario:
    """A last status of a million rows, asked over HTTP under a load, and what a fleet's updates make of it."""

    name: str
    title: str
    devices: int
    silent: int
    unity_down: int
    # of the devices, those that send meanwhile, and how many heartbeats a second come of them
    senders: int
    rate_per_s: float
    # of each question, one every so often
    requests: int
    every_s: float
    # devices, silent ones, minutes of updates
    growth: tuple[tuple[int, int, int], ...]
    p95: Limit
    hot: Limit

    def quicker(self) -> StatusScenario:
        """Fewer questions, and less growth."""
        return replace(self, requests=60, growth=((100_000, 100, 5), (2_000, 20, 60)))


@dataclass(frozen=True, slots=True)
class DaemonsScenario:
    """Several daemons on one PostgreSQL: as fast as it goes, the same heartbeats to all of them, a job on all."""

    name: str
    title: str
    devices: int
    numbers: tuple[int, ...]
    connections: int
    warm_s: float
    round_s: float
    # heartbeats of each device that are sent to every daemon at once
    copies_beats: int
    copies_connections: int
    # of an old day that the nightly run archives: else it ends before the second daemon has heard of it
    old_beats: int
    # hosts are network namespaces, each with a daemon and a generator of its own
    hosts: int

    def quicker(self) -> DaemonsScenario:
        """Shorter rounds."""
        return replace(self, warm_s=0.5, round_s=3.0, copies_beats=2, old_beats=50)


Scenario = (
    OpenLoopScenario
    | OfflineQueryScenario
    | ReconnectScenario
    | CeilingScenario
    | KillScenario
    | ArchiveScenario
    | ReaderScenario
    | OverloadScenario
)

STEADY_500: Final = OpenLoopScenario(
    name="1-steady-500",
    title="500 devices at 60 s",
    devices=500,
    interval_s=60,
    jitter_s=0,
    duration_s=60,
    limits=(*ALL_ACKNOWLEDGED, *FLOORS),
)
STEADY_2000: Final = OpenLoopScenario(
    name="2-steady-2000",
    title="2,000 devices at 60 s ± 15 s",
    devices=2000,
    interval_s=60,
    jitter_s=15,
    duration_s=60,
    limits=(
        *ALL_ACKNOWLEDGED,
        Limit("p50 at most 3 ms", "p50_ms", 3),
        Limit("p99 at most 20 ms", "p99_ms", 20),
        MEMORY,
    ),
)
OFFLINE_QUERY: Final = OfflineQueryScenario(
    name="3-offline-query",
    title="offline and unity-down, fast against legacy, 500 devices and a day of history",
    devices=500,
    beats=1440,
    interval_s=60,
    offline_share=0.1,
    minutes=10,
    legacy_rounds=10,
    fast_per_round=4,
    http_requests=500,
)
RECONNECT: Final = ReconnectScenario(
    name="4-reconnect",
    title="2,000 devices back within a second, 30 heartbeats each",
    devices=2000,
    interval_s=60,
    queue=30,
    within_s=1,
    bound_s=120,
    # refusals are the server's right here: the agent comes again; what counts is that nothing is left
    limits=(
        Limit("every heartbeat acknowledged", "left", 0),
        Limit("no queue overflowed", "dropped", 0),
        Limit("heartbeats acknowledged", "ok", 1, "at_least"),
    ),
)
CEILING: Final = CeilingScenario(
    name="5-ceiling",
    title="as fast as it goes, against a bare aiohttp handler",
    devices=2000,
    connections=(64, 128, 256),
    # A fleet has a connection for each device. With few, each waits for a commit before it sends again, and what is
    # measured is the length of a transaction rather than what the daemon can take.
    judged_at=256,
    trial_s=3.0,
    rounds=3,
    round_s=8.0,
    warm_s=2.0,
    ratio=Limit("of the bare handler's rate", "ratio", 0.55, "at_least"),
)
KILL: Final = KillScenario(
    name="kill",
    title="2,000 devices at 60 s ± 15 s, the daemon killed at a third of it and started again",
    devices=2000,
    interval_s=60,
    jitter_s=15,
    duration_s=60,
    drain_s=120,
    limits=(
        Limit("every heartbeat acknowledged", "left", 0),
        Limit("no queue overflowed", "dropped", 0),
        Limit("sends failed while it was dead", "failed", 1, "at_least"),
    ),
)
DEDUP: Final = OpenLoopScenario(
    name="dedup",
    title="2,000 devices at 60 s, each heartbeat sent 6.7 times within its bucket",
    devices=2000,
    interval_s=60,
    jitter_s=0,
    duration_s=60,
    duplicate_factor=6.7,
    limits=(
        *ALL_ACKNOWLEDGED,
        *FLOORS,
        Limit("deduplicated, at least 84 %", "deduplicated_share", 0.84, "at_least"),
        Limit("deduplicated, at most 86 %", "deduplicated_share", 0.86),
    ),
)

ARCHIVE: Final = ArchiveScenario(
    name="archive",
    title="a day of 2,000 devices archived, verified and dropped, under the load of scenario 2 and alone",
    devices=2000,
    beats=1440,
    interval_s=60,
    jitter_s=15,
    before_s=30,
    after_s=3,
    most_s=900,
    limits=ALL_ACKNOWLEDGED,
    growth=Limit("growth of the daemon's memory, below 64 MB", "growth_mb", 64),
    p99=Limit("p99 of ingest during the archive, below 50 ms", "p99_ms", 50),
    ratio=Limit("times as long as psql | zstd | sha256sum, alone", "ratio", 2),
)
READER: Final = ReaderScenario(
    name="long-reader",
    title="2,000 devices at 60 s ± 15 s, nightly runs while somebody reads the history, and after",
    devices=2000,
    beats=24,
    days_made=2,
    interval_s=60,
    jitter_s=15,
    before_s=5,
    read_s=20,
    after_s=5,
    most_s=300,
    # partitions.LOCK_TIMEOUT_MS, and a margin
    most_ms=2_500,
    limits=ALL_ACKNOWLEDGED,
)

OVERLOAD: Final = OverloadScenario(
    name="overload",
    title="twice what the machine takes for two minutes, and what comes after",
    devices=2000,
    # A connection has one request at a time, so the default queue of 10,000 would want more connections than that, and
    # as many descriptors, of the daemon and of the generator.
    connections=8000,
    queue_items=5000,
    capacity_s=6,
    normal=0.1,
    times=2,
    before_s=10,
    overload_s=120,
    after_s=30,
    calm_ms=150,
    limits=(
        Limit("sends without an answer", "failed", 0),
        Limit("answers other than 200 and 503", "other_answers", 0),
        Limit("refused, at least", "refused", 1, "at_least"),
        Limit("the generator's own lateness, p99 below 250 ms", "late_sends_p99_ms", 250),
        # a floor: ingest.answer_within_seconds; the queue holds 0.6 s of work on two idle cores
        Limit("p99 of what is accepted, below 10 s", "accepted_p99_ms", 10_000),
        Limit("p99 of what is refused, below 10 s", "refused_p99_ms", 10_000),
        Limit("accepted during it, of the capacity", "goodput", 0.4, "at_least"),
        Limit("different Retry-After", "retry_after_values", 8, "at_least"),
        Limit("longest next_heartbeat_seconds during it", "next_most_s", 61, "at_least"),
        Limit("longest next_heartbeat_seconds at the end", "next_after_s", 60),
        Limit("seconds until full service", "recovered_s", 5),
        Limit("growth of the daemon's memory, below 150 MB", "growth_mb", 150),
        Limit("growth in the second half, below 15 MB", "second_half_mb", 15),
    ),
)
OUTAGE: Final = OutageScenario(
    name="outage",
    title="2,000 agents at 60 s ± 15 s, PostgreSQL away for ten minutes",
    devices=2000,
    interval_s=60,
    jitter_s=15,
    before_s=60,
    outage_s=600,
    after_s=60,
    drain_s=420,
    limits=(
        Limit("every heartbeat acknowledged", "left", 0),
        Limit("no queue overflowed", "dropped", 0),
        Limit("sends without an answer", "failed", 0),
        Limit("answers other than 200 and 503", "other_answers", 0),
        Limit("503 heard meanwhile, at least", "refused", 1, "at_least"),
        # the agent waits 30 s
        Limit("longest wait for an answer, below 15 s", "waited_most_s", 15),
        Limit("ready again within 10 s", "ready_s", 10),
        Limit("growth of the daemon's memory, below 50 MB", "growth_mb", 50),
    ),
)
IDLE: Final = IdleScenario(
    name="idle",
    title="10,000 idle connections beside 500 devices at 60 s",
    connections=10_000,
    devices=500,
    interval_s=60,
    duration_s=60,
    until_closed=True,
    limits=(*ALL_ACKNOWLEDGED, *FLOORS, Limit("p99 at most 20 ms", "p99_ms", 20)),
    cut=Limit("idle connections closed before their time", "cut_early", 0),
    memory=Limit("memory of an idle connection, below 20 kB", "kb_each", 20),
)
# nexhb.daemon.KEEPALIVE_S is 150
KEPT_FOR: Final = (
    Limit("shortest life of an idle connection, s", "lived_least_s", 149, "at_least"),
    Limit("longest life of an idle connection, s", "lived_most_s", 155),
)

COMPARE: Final = CompareScenario(
    name="compare",
    title="nexhb beside its floors and its peers: one machine, one PostgreSQL, one generator, alternating rounds",
    devices=2000,
    steady=STEADY_2000,
    connections=(64, 256, 512, 1024),
    trial_s=3.0,
    rounds=3,
    round_s=6.0,
    warm_s=1.5,
    pools=(8, 12, 20),
    peer_connections=(32, 64, 256),
    peer_s=5.0,
    hashed_devices=16,
    hashed_connections=4,
    hashed_s=8.0,
    batch_connections=(16, 32, 64),
    batch_s=5.0,
    copy_rows=(2_000, 10_000),
    rates=(20_000 / 60, 500_000 / 60),
    rate_s=20.0,
    rate_connections=1_000,
)

CURVE: Final = CurveScenario(
    name="curve",
    title="fleets of 2,000 to 500,000 devices at 60 s, and the ceiling: latency, CPU, memory, bytes, daemons wanted",
    fleets=(2_000, 20_000, 200_000, 500_000),
    interval_s=60,
    settle_s=3.0,
    window_s=30.0,
    connections=1_000,
    first_connections=256,
    ceiling_devices=2_000,
    ceiling_connections=256,
    all_heard=True,
)

STATUS: Final = StatusScenario(
    name="status",
    title="device_last_status of 1,000,000 devices, 1,000 of them silent, asked over HTTP while heartbeats come in",
    devices=1_000_000,
    silent=1_000,
    unity_down=300,
    senders=20_000,
    rate_per_s=333,
    requests=200,
    every_s=0.05,
    growth=((1_000_000, 1_000, 5), (100_000, 100, 60), (2_000, 20, 60)),
    p95=Limit("p95 below 10 ms", "p95_ms", 10),
    # one in five changes its slot, and autovacuum has no time here
    hot=Limit("HOT share of a fleet's updates", "", 0.6, "at_least"),
)

DAEMONS: Final = DaemonsScenario(
    name="daemons",
    title="1, 2 and 3 daemons on one PostgreSQL, on one host and on two",
    devices=2_000,
    numbers=(1, 2, 3),
    connections=256,
    warm_s=1.5,
    round_s=8.0,
    copies_beats=5,
    copies_connections=64,
    old_beats=100,
    hosts=2,
)

SCENARIOS: Final[tuple[Scenario, ...]] = (
    STEADY_500,
    STEADY_2000,
    OFFLINE_QUERY,
    RECONNECT,
    CEILING,
    KILL,
    DEDUP,
    ARCHIVE,
    READER,
    OVERLOAD,
)
