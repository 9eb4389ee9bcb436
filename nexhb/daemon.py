"""The composition root. It starts the components in the order in which they depend on each other, and stops them in
reverse: not ready → stop accepting → finish handlers → drain the writer → close connections → stop PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from nexhb import availability, disk, keys, log, notify, preparation, supervision
from nexhb.clock import DatabaseClock, system_now
from nexhb.config import Settings
from nexhb.devices.store import DeviceStore
from nexhb.devices.troubles import Troubles
from nexhb.http import server
from nexhb.http.changes import Changes
from nexhb.http.credentials import WrongKeys
from nexhb.http.device_api import admission
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.operator_api.admin_key import AdminKey
from nexhb.http.operator_api.context import OperatorApi
from nexhb.http.transport import tls
from nexhb.http.transport.connections import Connections
from nexhb.http.unavailability import Unavailability
from nexhb.ingest.intake import Intake
from nexhb.ingest.writer import Writer
from nexhb.jobs.registry import Jobs, uptime_rules
from nexhb.jobs.schedule import Schedule
from nexhb.messages import channels
from nexhb.messages.channels import Channels
from nexhb.messages.delivery import Delivery
from nexhb.messages.own_outage import OwnOutage
from nexhb.messages.ping import Ping
from nexhb.messages.routes import routes_of
from nexhb.messages.telling import Teller
from nexhb.nexmdm.adoption import Adoption
from nexhb.nexmdm.lookup import Lookup
from nexhb.open_files import connection_limit
from nexhb.postgres.cluster import open_cluster
from nexhb.postgres.identity import CheckedDatabase, DatabaseTracker
from nexhb.readiness import Readiness, Source
from nexhb.reading import flags
from nexhb.reading.comparison import PerfDiff
from nexhb.reading.events import EventReads
from nexhb.reading.following import Follower
from nexhb.reading.pools import open_readers
from nexhb.watching.judging import watch_rules
from nexhb.watching.uptime_reads import UptimeReads
from nexhb.watching.watcher import Watcher

_log = log.get("daemon")

Now = Callable[[], datetime]

NO_MANAGER = notify.Notifier()


@dataclass(frozen=True)
class Running:
    """A running daemon."""

    url: str
    instance_url: str | None  # the URL of this daemon alone
    settings: Settings
    embedded: bool
    admin_key: str = field(repr=False)
    tasks: supervision.SideTasks
    renew_tls: Callable[[], bool]  # read the certificate again; False if that fails
    status: Callable[[], str]  # the status in one line


@asynccontextmanager
async def running(
    settings: Settings, now: Now | None = None, manager: notify.Notifier = NO_MANAGER
) -> AsyncIterator[Running]:
    """Run the whole daemon for the block. `now` is the clock of all its parts; default: the database's.
    Raises NexhbError if the daemon cannot start."""
    readiness = Readiness()
    readiness.block(Source.LIFECYCLE, "The daemon is starting.")
    now = DatabaseClock() if now is None else now
    certificate = tls.Certificate(settings.server)
    max_connections = connection_limit(settings.server.connections_max)
    connections = Connections(max_connections=max_connections, head_timeout_s=settings.server.head_timeout_seconds)
    async with AsyncExitStack() as stack:
        tasks = supervision.SideTasks(stack)
        routes = await _open_channels(stack, tasks, settings, readiness)
        manager.send(STATUS="Starting PostgreSQL." if settings.database.url is None else "Starting.")
        cluster = await stack.enter_async_context(open_cluster(settings, create=True))
        tracker = DatabaseTracker.load(settings.data_dir)
        database = CheckedDatabase.wrap(cluster.database, tracker)
        admin_key = keys.read_or_make(settings)
        manager.send(STATUS="Starting: preparing the database.")
        await preparation.prepare(cluster.database, settings, readiness, now)
        intake = Intake(readiness, max_items=settings.ingest.queue_items, max_bytes=settings.ingest.queue_bytes)
        tasks.start("cluster", cluster.watch(settings.data_dir))
        # Before any other listener: admitted heartbeats have device numbers of the previous database.
        tracker.on_change(partial(intake.fail_all, "the database was replaced"))
        devices = await _start_devices(stack, tasks, settings, database)
        store = await _start_flags(tasks, settings, database, now)
        adoption = _start_adoption(stack, tasks, settings, database, now)
        reads, history_reads = await stack.enter_async_context(open_readers(settings, database, tracker))
        perf_diff = PerfDiff(database, store, settings, now)
        tasks.start("perf_diff", perf_diff.run())
        writer = Writer(
            database, intake, readiness, batch_max=settings.ingest.batch_max, tracker=tracker,
            noteworthy=watch_rules(settings).noteworthy,
        )  # fmt: skip
        status = partial(supervision.status_line, readiness, intake, writer, certificate)
        tasks.start("manager", supervision.notify_manager(manager, writer, readiness, status))
        tasks.start("writer", writer.run())
        stack.push_async_callback(writer.stop, settings.ingest.answer_within_seconds)
        tasks.start("sweeper", supervision.sweep(settings, intake, connections))
        tasks.start("disk", disk.watch(settings, readiness))
        tasks.start("settings", preparation.watch_settings(settings, cluster.database, readiness))
        tasks.start("days ahead", preparation.create_days_ahead(settings, database, now))
        _start_availability(tasks, readiness, database, now)
        _start_watching(tasks, settings, database, now, readiness=readiness, opened=routes)
        jobs = Jobs(database, settings, now)
        tasks.start("schedule", Schedule(database, jobs, settings.jobs, now).run())
        troubles = _start_troubles(tasks, settings, database, now)
        unavailability = Unavailability(intake.retry_after_s)
        wrong_keys = WrongKeys(settings, intake.retry_after_s)
        changes = Changes(database, unavailability)
        device_api = DeviceApi.create(
            settings, now, devices=devices, adoption=adoption, tracker=tracker, intake=intake, troubles=troubles,
            wrong_keys=wrong_keys, unavailability=unavailability, changes=changes,
        )  # fmt: skip
        operator_api = OperatorApi(
            settings, now, AdminKey(admin_key, wrong_keys), changes, channels=routes, reads=reads,
            history_reads=history_reads, events=EventReads(reads),
            uptime=UptimeReads(reads, uptime_rules(settings)), follower=_start_follower(tasks, database),
            perf_diff=perf_diff, flags=store, troubles=troubles, jobs=jobs, readiness=readiness, tracker=tracker,
            adoption=adoption, intake=intake, next_heartbeat_s=partial(admission.next_heartbeat_s, device_api),
        )  # fmt: skip
        url, instance_url = await stack.enter_async_context(
            server.serving(device_api, operator_api, connections, certificate.context)
        )
        stack.callback(readiness.block, Source.LIFECYCLE, "The daemon is stopping.")
        readiness.clear(Source.LIFECYCLE)
        yield Running(
            url, instance_url, settings, settings.database.url is None, admin_key, tasks, certificate.renew, status
        )


async def _start_devices(
    stack: AsyncExitStack, tasks: supervision.SideTasks, settings: Settings, database: CheckedDatabase
) -> DeviceStore:
    devices = DeviceStore(database, refresh_s=settings.auth.refresh_seconds, tracker=database.tracker)
    stack.push_async_callback(devices.close)
    await devices.load()
    await database.tracker.add(database)
    tasks.start("generations", database.tracker.run(database))
    tasks.start("devices", devices.run())
    return devices


async def _start_flags(
    tasks: supervision.SideTasks, settings: Settings, database: CheckedDatabase, now: Now
) -> flags.FlagStore:
    store = flags.FlagStore(database, flags.first_values(settings.reads), now, database.tracker)
    await store.load()
    tasks.start("flags", store.run())
    return store


def _start_adoption(
    stack: AsyncExitStack, tasks: supervision.SideTasks, settings: Settings, database: CheckedDatabase, now: Now
) -> Adoption:
    """Adopt tokens of NexMDM, and look unknown ones up in its database if that is configured."""
    lookup = None
    if settings.legacy.source is not None:
        lookup = Lookup(settings.legacy.source.get_secret_value(), database, now, database.tracker)
        stack.push_async_callback(lookup.close)
        tasks.start("legacy", lookup.run())
    adoption = Adoption(database, now, tracker=database.tracker, lookup=lookup)
    stack.push_async_callback(adoption.close)
    tasks.start("adoption", adoption.run())
    return adoption


def _start_availability(
    tasks: supervision.SideTasks, readiness: Readiness, database: CheckedDatabase, now: Now
) -> None:
    if isinstance(now, DatabaseClock):  # a gap between two renewals is meaningful only by the database's clock
        note_clock = partial(preparation.note_clock, readiness, now)
        keeper = availability.AvailabilityKeeper(database, now, lambda: readiness.can_commit, note_clock)
        tasks.start("presence", keeper.run())


async def _open_channels(
    stack: AsyncExitStack, tasks: supervision.SideTasks, settings: Settings, readiness: Readiness
) -> Channels:
    """Open the channels of messages, and tell routes of nexhb's own outages. This comes before PostgreSQL, which may be
    what is missing."""
    opened = await stack.enter_async_context(channels.opened(routes_of(settings), system_now))
    if any(route.for_nexhb for route in opened.routes.values()):
        tasks.start("own outage", OwnOutage(readiness, opened, settings.data_dir, system_now).run())
    return opened


def _start_watching(
    tasks: supervision.SideTasks, settings: Settings, database: CheckedDatabase, now: Now, *, readiness: Readiness,
    opened: Channels,
) -> None:  # fmt: skip
    """Watch the fleet, and deliver the messages about it."""
    ping = None
    if settings.watch.ping_url is not None:
        ping = Ping(opened.webhooks, settings.watch.ping_url.get_secret_value())
        tasks.start("ping", ping.run())
    teller = Teller([*opened.routes.values()], readiness, ping)
    database.tracker.on_change(teller.forget)
    rules, interval_s = watch_rules(settings), settings.watch.interval_seconds
    tasks.start("watch", Watcher(database, rules, interval_s, now, tracker=database.tracker, tell=teller).run())
    if opened.routes:
        tasks.start("delivery", Delivery(database, opened, now, database.tracker).run())


def _start_follower(tasks: supervision.SideTasks, database: CheckedDatabase) -> Follower:
    follower = Follower(database, database.tracker)
    tasks.start("stream", follower.run())
    return follower


def _start_troubles(tasks: supervision.SideTasks, settings: Settings, database: CheckedDatabase, now: Now) -> Troubles:
    troubles = Troubles(database, now, settings.ingest.bucket_seconds)
    database.tracker.on_change(troubles.forget)
    tasks.start("troubles", troubles.run())
    return troubles
