"""Every metric, declared once. The old system's metrics keep their names; new names start with `nexhb_`.

The ledger of heartbeats: ingested = writes + dedupe + refused + failed + those still unanswered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import nan

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

# The daemon is one process with one registry, the library's own, which also has the metrics of the process. The
# library's multiprocess mode loses metrics, and can block.
disable_created_metrics()  # type: ignore[no-untyped-call]

_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 300, 500, 1000, 3000, 10000)


def _cumulative(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Return the buckets in Prometheus' form: each bound, and +Inf, with the count of values up to it."""
    return list(zip([*(str(float(bound)) for bound in bounds), "+Inf"], accumulate(counts), strict=True))


class RequestLatency(Collector):
    """http_request_latency_ms, counted in plain numbers: the library's histogram needs a lock and 3 µs for each
    request, of the 60 µs that a heartbeat may cost. Only the event loop's thread writes."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, int], list[float]] = {}

    def series(self, route: str, method: str) -> Callable[[int, float], None]:
        """Return a function that records a request's status and its duration in seconds."""
        by_status: dict[int, list[float]] = {}

        def observe(status: int, seconds: float) -> None:
            counts = by_status.get(status)
            if counts is None:
                # A count for each bound, one for values beyond the last bound, and the sum.
                counts = self._series.setdefault((route, method, status), [0.0] * (len(_MS) + 2))
                by_status[status] = counts
            ms = seconds * 1000
            counts[bisect_left(_MS, ms)] += 1
            counts[-1] += ms

        return observe

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram in Prometheus' form."""
        family = HistogramMetricFamily(
            "http_request_latency_ms",
            "From the request's headers to the response",
            labels=["route", "method", "status"],
        )
        for (route, method, status), counts in list(self._series.items()):
            family.add_metric([route, method, str(status)], _cumulative(_MS, counts[:-1]), sum_value=counts[-1])
        yield family


class PlainHistogram(Collector):
    """A histogram without labels, counted in plain numbers like RequestLatency, for the same reason."""

    def __init__(self, name: str, documentation: str, buckets: tuple[float, ...]) -> None:
        self._name, self._documentation, self._buckets = name, documentation, buckets
        self._counts = [0] * (len(buckets) + 1)  # the last one is for values beyond the last bound
        self._sum = 0.0
        REGISTRY.register(self)

    def observe(self, value: float) -> None:
        """Record one value."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram in Prometheus' form."""
        buckets = _cumulative(self._buckets, self._counts)
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


heartbeats_ingested = Counter("heartbeats_ingested", "Heartbeats received, whatever their outcome")
hb_writes = Counter("hb_writes", "Heartbeats committed as a row of the history")
hb_dedupe = Counter("hb_dedupe", "Heartbeats dropped as duplicates: their bucket already had a row")
heartbeats_refused = Counter(
    "nexhb_heartbeats_refused", "Heartbeats rejected for good: a retry would fail too", ["reason"]
)
heartbeats_failed = Counter(
    "nexhb_heartbeats_failed", "Heartbeats that received 503: the device keeps them", ["reason"]
)
last_status_upserts = Counter("last_status_upserts", "Rows of device_last_status written by ingest")
clock_outside_window = Counter(
    "nexhb_heartbeats_clock_outside_window",
    "Heartbeats stored at the time of receipt, because their own time is outside the accept window",
)
device_id_mismatch = Counter("nexhb_device_id_mismatch", "Heartbeats whose device_id is not that of the token")
fields_dropped = Counter(
    "nexhb_fields_dropped", "Optional values stored as null because they could not be parsed", ["field"]
)
device_queue_depth = PlainHistogram(
    "nexhb_device_queue_depth",
    "Length of the queue that devices report in a heartbeat",
    buckets=(0, 1, 2, 5, 10, 50, 100, 250, 500),
)

intake_items = Gauge("nexhb_intake_items", "Heartbeats admitted and not yet answered")
intake_bytes = Gauge("nexhb_intake_bytes", "Bytes of heartbeats admitted and not yet answered")
intake_filled = Gauge(
    "nexhb_intake_filled_ratio",
    "How full the queue is, by items or bytes, whichever is higher; at 1, devices receive 503",
)
# packaging/prometheus derives the number of daemons needed from queue_wait, loop_lag, the batches and the process' CPU
# time.
_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
queue_wait = Histogram(
    "nexhb_queue_wait_seconds",
    "From the admission of a batch's oldest heartbeat until the writer dequeues it",
    buckets=_WAITS,
)
loop_lag = Histogram(
    "nexhb_loop_lag_seconds", "How late the event loop woke a sleeping task, measured twice a second", buckets=_WAITS
)
batch_limit = Gauge("nexhb_batch_limit_heartbeats", "ingest.batch_max: the maximum of heartbeats in one transaction")
batch_rows = Histogram(
    "nexhb_batch_heartbeats",
    "Heartbeats committed together",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
)
hb_write_latency_ms = Histogram("hb_write_latency_ms", "One batch, from BEGIN to COMMIT", buckets=_MS)
staging_batches = Counter(
    "nexhb_staging_batches",
    "Batches repeated through the staging table after a unique violation",
)
write_retries = Counter("nexhb_write_retries", "Retries of a commit", ["kind"])
for _kind in ("lost", "transient", "no_partition"):
    write_retries.labels(kind=_kind)
commits_in_doubt = Counter(
    "nexhb_commits_in_doubt",
    "Commits in doubt because the connection was lost, by the outcome that a later look-up returned",
    ["outcome"],
)
log_lines_lost = Counter("nexhb_log_lines_lost", "Log lines that could not be written: stderr is full or not read")
disk_free = Gauge(
    "nexhb_disk_free_bytes", "Free bytes on the disk of the embedded PostgreSQL; NaN with another database"
)
disk_free_inodes = Gauge(
    "nexhb_disk_free_inodes",
    "Free inodes on the disk of the embedded PostgreSQL; NaN if there is no limit, or with another database",
)
ready = Gauge("nexhb_ready", "1 while heartbeats can be committed")
last_commit = Gauge("nexhb_last_commit_timestamp_seconds", "When a batch was last committed")
clock_apart = Gauge(
    "nexhb_clock_apart_seconds", "How far the host's clock is ahead of the database's, which nexhb uses"
)

days_ahead = Gauge(
    "nexhb_days_ahead", "Days after today that already have a partition, without a gap; -1: today has none"
)
days_ahead.set(nan)  # not known yet: unlike a 0, NaN fires no alert
partitions = Gauge("nexhb_partitions", "Days by their state in hb_partitions", ["state"])
partitions_created = Counter("partitions_created", "Partitions created")
partition_create_failures = Counter("partition_create_failures", "Partitions that could not be created")
partitions_archived = Counter("partitions_archived", "Days archived and verified")
partitions_dropped = Counter("partitions_dropped", "Days dropped after their archive was verified")
archive_failures = Counter("archive_failures", "Days that could not be archived or verified; their tables are kept")
late_heartbeats = Counter(
    "nexhb_late_heartbeats",
    "Heartbeats that arrived after their day was detached, kept for the nightly run",
    ["reason"],
)
for _reason in ("detached", "archived", "archive_failed", "dropped"):
    late_heartbeats.labels(reason=_reason)  # a series that begins with its first heartbeat shows no increase
last_drill = Gauge("nexhb_last_restore_drill_timestamp_seconds", "When an archived day was last restored and compared")

reconciliation_rows_updated = Counter("reconciliation_rows_updated", "Rows of device_last_status corrected")
reconciliation_runs = Counter("reconciliation_runs", "Runs of the reconciliation", ["status"])
reconciliation_drift = Gauge(
    "nexhb_reconciliation_drift_ratio",
    "Share of wrong rows of device_last_status among those that the last run checked",
)
job_runs = Counter("nexhb_job_runs", "Runs of a job", ["job", "status"])
job_last_success = Gauge("nexhb_job_last_success_timestamp_seconds", "When a job last completed; 0: never", ["job"])
job_duration = Gauge("nexhb_job_duration_seconds", "How long the job's last run took", ["job"])

http_request_latency_ms = RequestLatency()
REGISTRY.register(http_request_latency_ms)
last_status_read_latency_ms = Histogram("last_status_read_latency_ms", "Reads for operators", ["query"], buckets=_MS)
connections_open = Gauge("nexhb_connections_open", "Open HTTP connections")
connections_limit = Gauge(
    "nexhb_connections_limit", "Limit of open connections; beyond it, the oldest without a valid key is closed"
)
connections_cut = Counter("nexhb_connections_cut", "HTTP connections that the daemon closed, by reason", ["reason"])
rate_limited = Counter("nexhb_rate_limited", "Requests that received 429", ["kind"])
next_heartbeat = Gauge(
    "nexhb_next_heartbeat_seconds", "The interval that devices are asked to keep; longer while the queue is filling up"
)
unauthorized = Counter("nexhb_unauthorized", "Requests without a valid key", ["kind"])
database_older = Gauge("nexhb_database_older", "1 while the database is an older copy that no operator has accepted")
devices_known = Gauge("nexhb_devices_known", "Device tokens held in memory")
legacy_lookups = Counter("nexhb_legacy_lookups", "Unknown tokens looked up in NexMDM's database", ["outcome"])
adoptions = Counter(
    "nexhb_adoptions", "Unknown tokens compared with the bcrypt hashes imported from NexMDM", ["outcome"]
)
device_refreshes = Counter("nexhb_device_refreshes", "Reloads of the token store", ["why", "status"])

fleet_devices = Gauge("nexhb_fleet_devices", "Devices by state, as the watcher has established it", ["state"])
site_devices = Gauge(
    "nexhb_site_devices", "Devices of each site by state; absent if there are more than 1,000 sites", ["site", "state"]
)
incidents_open = Gauge("nexhb_incidents_open", "Open incidents by scope", ["scope"])
site_incidents_open = Gauge(
    "nexhb_site_incidents_open",
    "1 for each site that is down as a whole, by kind of fault; absent if there are more than 1,000 such sites",
    ["site", "kind"],
)
watch_rounds = Counter("nexhb_watch_rounds", "Rounds of the watcher that this daemon completed")
watch_failures = Counter("nexhb_watch_failures", "Devices that a round could not judge because of an unexpected error")
watch_last_round = Gauge(
    "nexhb_watch_last_round_timestamp_seconds", "When this daemon last completed a round of the watcher; 0: never"
)
notifications = Counter(
    "nexhb_notifications",
    "Attempts to deliver a message (delivered, failed), and messages given up",
    ["route", "result"],
)

flag = Gauge("nexhb_flag", "The flags in force: 1 for on, 0 for off, else the flag's number", ["flag"])

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
watch_round_duration = Histogram("nexhb_watch_round_duration_seconds", "Rounds of the watcher", buckets=_SECONDS)
history_read_latency = Histogram(
    "nexhb_legacy_read_latency_seconds", "Reads for operators from the history", ["query"],
    buckets=_SECONDS,
)  # fmt: skip
perf_diff_latency = Histogram(
    "nexhb_perf_diff_latency_seconds",
    "Reads that perf_diff made from both sources",
    ["query", "source"],
    buckets=_SECONDS,
)
perf_diff_comparisons = Counter(
    "nexhb_perf_diff_comparisons", "Reads that perf_diff selected for a comparison, by outcome", ["query", "result"]
)
perf_diff_turned_off = Counter("nexhb_perf_diff_turned_off", "Times that perf_diff turned read_from_last_status off")
