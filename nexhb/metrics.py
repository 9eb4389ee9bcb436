"""Every metric, declared once. The names of the seed stay as they were; new ones start with `nexhb_`.

The ledger of heartbeats: ingested = writes + dedupe + refused + failed + what is still unanswered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import nan

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

# One process, one registry (the library's own, which has the process' metrics too): its multiprocess mode loses and
# wedges metrics.
disable_created_metrics()  # type: ignore[no-untyped-call]

_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 300, 500, 1000, 3000, 10000)


def _cumulated(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """As Prometheus wants it: at each bound, and beyond the last, all that are not above it."""
    return list(zip([*(str(float(bound)) for bound in bounds), "+Inf"], accumulate(counts), strict=True))


class RequestLatency(Collector):
    """http_request_latency_ms, counted in plain integers: the library's own histogram takes a lock and 3 µs for each
    request, of the 60 that a heartbeat may cost. Only the event loop's thread writes."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, int], list[float]] = {}

    def series(self, route: str, method: str) -> Callable[[int, float], None]:
        """A function that takes a status and a duration in seconds."""
        found: dict[int, list[float]] = {}

        def observe(status: int, seconds: float) -> None:
            counts = found.get(status)
            if counts is None:
                # A count for each bound, one for what is beyond them, and the sum.
                counts = self._series.setdefault((route, method, status), [0.0] * (len(_MS) + 2))
                found[status] = counts
            ms = seconds * 1000
            counts[bisect_left(_MS, ms)] += 1
            counts[-1] += ms

        return observe

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As Prometheus wants it: cumulative."""
        family = HistogramMetricFamily(
            "http_request_latency_ms", "From the request's headers to its answer", labels=["route", "method", "status"]
        )
        for (route, method, status), counts in list(self._series.items()):
            family.add_metric([route, method, str(status)], _cumulated(_MS, counts[:-1]), sum_value=counts[-1])
        yield family


class PlainHistogram(Collector):
    """A histogram without labels, counted as RequestLatency is and for the same reason."""

    def __init__(self, name: str, documentation: str, buckets: tuple[float, ...]) -> None:
        self._name, self._documentation, self._buckets = name, documentation, buckets
        self._counts = [0] * (len(buckets) + 1)  # of what is beyond the last, too
        self._sum = 0.0
        REGISTRY.register(self)

    def observe(self, value: float) -> None:
        """Count it."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As Prometheus wants it: cumulative."""
        buckets = _cumulated(self._buckets, self._counts)
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


heartbeats_ingested = Counter("heartbeats_ingested", "Heartbeats received, whatever became of them")
hb_writes = Counter("hb_writes", "Heartbeats committed as a row of the history")
hb_dedupe = Counter("hb_dedupe", "Heartbeats dropped: their bucket already had its row")
heartbeats_refused = Counter("nexhb_heartbeats_refused", "Heartbeats that no retry can save", ["reason"])
heartbeats_failed = Counter("nexhb_heartbeats_failed", "Heartbeats answered 503: the device keeps them", ["reason"])
last_status_upserts = Counter("last_status_upserts", "Rows of device_last_status written by ingest")
clock_outside_window = Counter(
    "nexhb_heartbeats_clock_outside_window",
    "Heartbeats stored at the time of receipt, their own lying outside the accept window",
)
device_id_mismatch = Counter("nexhb_device_id_mismatch", "Heartbeats whose device_id is not the token's")
fields_dropped = Counter("nexhb_fields_dropped", "Optional values stored as null, being unreadable", ["field"])
device_queue_depth = PlainHistogram(
    "nexhb_device_queue_depth",
    "Heartbeats that devices say they still hold",
    buckets=(0, 1, 2, 5, 10, 50, 100, 250, 500),
)

intake_items = Gauge("nexhb_intake_items", "Heartbeats admitted and not yet answered")
intake_bytes = Gauge("nexhb_intake_bytes", "Bytes of heartbeats admitted and not yet answered")
intake_filled = Gauge("nexhb_intake_filled_ratio", "How full the queue is, by items or by bytes; at 1 devices hear 503")
# How many daemons are wanted (packaging/prometheus) hangs on these two, on batches and on the process' CPU.
_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
queue_wait = Histogram(
    "nexhb_queue_wait_seconds", "From a batch's oldest heartbeat's admission to the writer's taking it", buckets=_WAITS
)
loop_lag = Histogram(
    "nexhb_loop_lag_seconds", "How late the event loop woke a task that slept, twice a second", buckets=_WAITS
)
batch_limit = Gauge("nexhb_batch_limit_heartbeats", "ingest.batch_max: heartbeats committed together at most")
batch_rows = Histogram(
    "nexhb_batch_heartbeats",
    "Heartbeats committed together",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
)
hb_write_latency_ms = Histogram("hb_write_latency_ms", "One batch, from BEGIN to COMMIT", buckets=_MS)
staging_batches = Counter(
    "nexhb_staging_batches",
    "Batches redone through the staging table after a unique violation",
)
write_retries = Counter("nexhb_write_retries", "Attempts to commit that are made again", ["kind"])
for _kind in ("lost", "transient", "no_partition"):
    write_retries.labels(kind=_kind)
commits_in_doubt = Counter(
    "nexhb_commits_in_doubt",
    "Connections lost around COMMIT, by what was found",
    ["outcome"],
)
log_lines_lost = Counter("nexhb_log_lines_lost", "Log lines that could not be written: stderr is full or not read")
disk_free = Gauge("nexhb_disk_free_bytes", "Free on the disk of the embedded PostgreSQL; NaN with another database")
disk_free_inodes = Gauge("nexhb_disk_free_inodes", "The same of its inodes; NaN also where they are not limited")
ready = Gauge("nexhb_ready", "1 while heartbeats can be committed")
last_commit = Gauge("nexhb_last_commit_timestamp_seconds", "When a batch was last committed")
clock_apart = Gauge("nexhb_clock_apart_seconds", "How far the host's clock is ahead of the database's, which counts")

days_ahead = Gauge("nexhb_days_ahead", "Days behind today that have their partition, without a gap; -1: not even today")
days_ahead.set(nan)  # not known yet: that fires no alert, as a 0 would
partitions = Gauge("nexhb_partitions", "Days by their state in hb_partitions", ["state"])
partitions_created = Counter("partitions_created", "Partitions made")
partition_create_failures = Counter("partition_create_failures", "Partitions that could not be made")
partitions_archived = Counter("partitions_archived", "Days archived and verified")
partitions_dropped = Counter("partitions_dropped", "Days dropped after their archive had been verified")
archive_failures = Counter("archive_failures", "Days that could not be archived or verified; their tables are kept")
late_heartbeats = Counter("nexhb_late_heartbeats", "Heartbeats whose day was gone already, kept aside", ["reason"])
for _reason in ("detached", "archived", "archive_failed", "dropped"):
    late_heartbeats.labels(reason=_reason)  # one that begins with its first heartbeat shows no increase
last_drill = Gauge("nexhb_last_restore_drill_timestamp_seconds", "When an archived day was last restored and compared")

reconciliation_rows_updated = Counter("reconciliation_rows_updated", "Rows of device_last_status healed")
reconciliation_runs = Counter("reconciliation_runs", "Runs of the reconciliation", ["status"])
reconciliation_drift = Gauge(
    "nexhb_reconciliation_drift_ratio", "Rows of device_last_status found wrong, of those checked by the last run"
)
job_runs = Counter("nexhb_job_runs", "Runs of a job", ["job", "status"])
job_last_success = Gauge(
    "nexhb_job_last_success_timestamp_seconds", "When a job last did all of its work; 0: never", ["job"]
)
job_duration = Gauge("nexhb_job_duration_seconds", "How long the job's last run took", ["job"])

http_request_latency_ms = RequestLatency()
REGISTRY.register(http_request_latency_ms)
last_status_read_latency_ms = Histogram("last_status_read_latency_ms", "Reads for operators", ["query"], buckets=_MS)
connections_open = Gauge("nexhb_connections_open", "Open HTTP connections")
connections_limit = Gauge("nexhb_connections_limit", "server.connections_max: beyond, the oldest without a key is cut")
connections_cut = Counter("nexhb_connections_cut", "HTTP connections closed by the daemon for what they do", ["reason"])
rate_limited = Counter("nexhb_rate_limited", "Calls answered 429", ["kind"])
next_heartbeat = Gauge("nexhb_next_heartbeat_seconds", "What devices are asked to wait: more when the queue runs full")
unauthorized = Counter("nexhb_unauthorized", "Calls without a valid key", ["kind"])
database_older = Gauge("nexhb_database_older", "1 while the database is an older copy that nobody has accepted")
devices_known = Gauge("nexhb_devices_known", "Device tokens held in memory")
legacy_lookups = Counter("nexhb_legacy_lookups", "Unknown tokens looked up in NexMDM's database", ["outcome"])
adoptions = Counter("nexhb_adoptions", "Unknown tokens tried against the bcrypt hashes that NexMDM left", ["outcome"])
device_refreshes = Counter("nexhb_device_refreshes", "Times the token store was read", ["why", "status"])

flag = Gauge("nexhb_flag", "The flags as they are in force: 1 or 0 where one is on or off, else its number", ["flag"])

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
legacy_read_latency = Histogram(
    "nexhb_legacy_read_latency_seconds", "Reads for operators that are answered from the history", ["query"],
    buckets=_SECONDS,
)  # fmt: skip
perf_diff_latency = Histogram(
    "nexhb_perf_diff_latency_seconds",
    "Reads that perf_diff asked both ways",
    ["query", "source"],
    buckets=_SECONDS,
)
perf_diff_comparisons = Counter(
    "nexhb_perf_diff_comparisons", "Reads that perf_diff was to ask both ways, by what came of it", ["query", "result"]
)
perf_diff_turned_off = Counter("nexhb_perf_diff_turned_off", "Times that perf_diff turned read_from_last_status off")
