"""The composition root. Parts start in the order of a heartbeat's needs and stop in the reverse:
not ready → stop accepting → finish handlers → drain the writer → close the connections → stop PostgreSQL."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from math import nan
from typing import Any

from aiohttp import web

from nexhb import (
    __version__,
    clock,
    db,
    disk,
    flags,
    identity,
    keys,
    log,
    metrics,
    migrate,
    notify,
    numbers,
    partitions,
    taking,
)
from nexhb import writer as writing
from nexhb.clock import DatabaseClock
from nexhb.cluster import open_cluster
from nexhb.config import Server, Settings
from nexhb.db import Database
from nexhb.devices import DeviceStore
from nexhb.errors import ConfigError, DatabaseUnavailable, DatabaseUnfit, NexhbError, PoolerBetween
from nexhb.http import listening, tls
from nexhb.http.app import make_app
from nexhb.http.auth import AdminKey
from nexhb.http.connections import Connections
from nexhb.http.express import Express
from nexhb.http.parts import Parts
from nexhb.intake import Intake
from nexhb.jobs.board import Jobs
from nexhb.jobs.schedule import Schedule
from nexhb.legacy.adopt import Adoption
from nexhb.legacy.lookup import Lookup
from nexhb.perfdiff import PerfDiff
from nexhb.pgerrors import FROM_THE_DATABASE, Kind, classify, is_retryable
from nexhb.reads import LEGACY_SESSION, Answers, FromHistory, Reads
from nexhb.troubles import Troubles
from nexhb.writer import Writer

_log = log.get("daemon")

KEEPALIVE_S = 150.0  # a fleet at 60 s ± 15 s keeps its connections; one at 600 s opens a new one each time
LINGER_S = 1.0  # how long an unwanted body is thrown away, so that its sender can read why, before the line is cut
SWEEP_S = 0.5
SETTINGS_S = 60.0
DISK_S = 2.0  # at 100 MB/s a reserve of 256 MiB lasts as long
OPEN_FILES_MOST = 1_048_576
OWN_FILES = (
    256  # kept from clients: the database's connections (20 or so), archives, and what one turn of the loop accepts
)
STATUS_S = 5.0  # how often a service manager hears how we are, unless its watchdog wants to more often
ASKED_S, ASK_S = 30.0, 10.0  # how much time a slow start asks of it at once, and how often
# What it asks for altogether: 300 s for the embedded PostgreSQL, 60 s for a database, the rest for migrations.
ASKED_MOST_S = 900.0
START_PATIENCE_S = 60.0  # how long a start waits for a database.url that does not answer yet


NOBODY = notify.Notifier()


def utc_now() -> datetime:
    """This host's clock: for commands."""
    return datetime.now(UTC)


@dataclass
class State:
    """Why the daemon cannot commit, besides what the intake says; empty while it can."""

    reasons: dict[str, str] = field(default_factory=dict)
    remark: str = ""  # for who looks, besides

    @property
    def hold(self) -> str:
        """Why no heartbeat should be taken, though one could be; empty where none is to be held off."""
        return self.reasons.get("unsafe", "") or self.reasons.get("disk", "")

    def not_ready(self, intake: Intake, *, in_full: bool = False) -> list[str]:
        """Every reason, for /readyz; in full with the database's own words, which are for operators."""
        closed = (in_full and intake.closed_in_full) or intake.closed_because
        return [reason for reason in (*self.reasons.values(), closed, intake.failing_because) if reason]


@dataclass(frozen=True)
class Running:
    """A daemon that serves."""

    url: str
    instance_url: str | None  # of this daemon alone
    settings: Settings
    embedded: bool
    admin_key: str = field(repr=False)
    failed: asyncio.Future[BaseException]  # resolved when a part died that the daemon cannot do without
    renew_tls: Callable[[], bool]  # read the certificate again; False where it cannot be read
    status: Callable[[], str]  # a line for who looks


@asynccontextmanager
async def running(
    settings: Settings, now: Callable[[], datetime] | None = None, manager: notify.Notifier = NOBODY
) -> AsyncIterator[Running]:
    """The whole daemon for the block. `now`: the clock that everything in it goes by; the database's unless another is
    given. Raises NexhbError where it cannot start."""
    state = State()
    now = DatabaseClock() if now is None else now
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    secure = tls.context(settings.server)
    most = connections_most(settings.server.connections_max)
    connections = Connections(most=most, head_timeout_s=settings.server.head_timeout_seconds)
    async with AsyncExitStack() as stack:
        manager.send(STATUS="Starting PostgreSQL." if settings.database.url is None else "Starting.")
        cluster = await stack.enter_async_context(open_cluster(settings, create=True))
        lives = identity.Lives.remembered(settings.data_dir)
        database = identity.Watched.of(cluster.database, lives)
        admin_key = keys.read_or_make(settings)
        manager.send(STATUS="Starting: the database, its schema and its days.")
        await _prepare(cluster.database, settings, state, now)
        intake = Intake(max_items=settings.ingest.queue_items, max_bytes=settings.ingest.queue_bytes)
        intake.held_because = state.hold
        await stack.enter_async_context(_side_task("cluster", cluster.watch(settings.data_dir), failed))
        # First of those who forget: what has been admitted bears device numbers of the database before.
        lives.on_change(partial(intake.fail_all, "the database was replaced"))
        devices = await stack.enter_async_context(_following_devices(settings, database, lives, failed))
        store = flags.FlagStore(database, flags.first_values(settings.reads), now, lives)
        await store.load()
        await stack.enter_async_context(_side_task("flags", store.run(), failed))
        lookup = await stack.enter_async_context(_looking_up(settings, database, now, lives, failed))
        adoption = Adoption(database, now, lives=lives, lookup=lookup)
        stack.push_async_callback(adoption.close)
        await stack.enter_async_context(_side_task("adoption", adoption.run(), failed))
        reads, legacy = await stack.enter_async_context(_readers(settings, database, lives))
        perf_diff = PerfDiff(database, store, settings, now)
        await stack.enter_async_context(_side_task("perf_diff", perf_diff.run(), failed))
        writer = Writer(database, intake, batch_max=settings.ingest.batch_max, lives=lives)
        status = partial(_status, state, intake, writer)
        await stack.enter_async_context(_side_task("manager", _keep_telling(manager, writer, state, status), failed))
        await stack.enter_async_context(_side_task("writer", writer.run(), failed))
        stack.push_async_callback(writer.stop, settings.ingest.answer_within_seconds)
        await stack.enter_async_context(_side_task("sweeper", _sweep(settings, intake, state, connections), failed))
        await stack.enter_async_context(_side_task("disk", _watch_disk(settings, state), failed))
        await stack.enter_async_context(
            _side_task("settings", _keep_looking_at_settings(settings, cluster.database, state), failed)
        )
        await stack.enter_async_context(_side_task("days ahead", _keep_days_ahead(settings, database, now), failed))
        if isinstance(now, DatabaseClock):  # by another clock, a gap between two renewals would mean nothing
            keeper = taking.Keeper(database, now, lambda: not intake.refuses, partial(_note_clock, state, now))
            await stack.enter_async_context(_side_task("presence", keeper.run(), failed))
        jobs = Jobs(database, settings, now)
        schedule = Schedule(database, jobs, settings.jobs, now)
        await stack.enter_async_context(_side_task("schedule", schedule.run(), failed))
        parts = Parts(
            settings=settings, database=database, devices=devices, adoption=adoption, intake=intake,
            reads=reads, legacy=legacy, flags=store, perf_diff=perf_diff, jobs=jobs,
            troubles=await stack.enter_async_context(_troubles(database, settings, now, lives, failed)),
            admin=AdminKey(admin_key), now=now, not_ready=lambda in_full: state.not_ready(intake, in_full=in_full),
            lives=lives,
        )  # fmt: skip
        ports = await stack.enter_async_context(_serving(parts, connections, secure))
        stack.callback(_stopping, state)
        metrics.ready.set(0 if state.not_ready(intake) else 1)
        yield Running(
            *_urls(settings.server, ports), settings, settings.database.url is None, admin_key, failed,
            partial(_renew_tls, secure, settings.server, state), status,
        )  # fmt: skip


@asynccontextmanager
async def _following_devices(
    settings: Settings, database: Database, lives: identity.Lives, failed: asyncio.Future[BaseException]
) -> AsyncIterator[DeviceStore]:
    devices = DeviceStore(database, refresh_s=settings.auth.refresh_seconds, lives=lives)
    await devices.load()
    await lives.add(database)
    try:
        async with (
            _side_task("generations", lives.run(database), failed),
            _side_task("devices", devices.run(), failed),
        ):
            yield devices
    finally:
        await devices.close()


@asynccontextmanager
async def _looking_up(
    settings: Settings,
    database: Database,
    now: Callable[[], datetime],
    lives: identity.Lives,
    failed: asyncio.Future[BaseException],
) -> AsyncIterator[Lookup | None]:
    """Looks tokens up in NexMDM's database, where that is configured."""
    if settings.legacy.source is None:
        yield None
        return
    lookup = Lookup(settings.legacy.source.get_secret_value(), database, now, lives)
    try:
        async with _side_task("legacy", lookup.run(), failed):
            yield lookup
    finally:
        await lookup.close()


@asynccontextmanager
async def _readers(
    settings: Settings, database: Database, lives: identity.Lives
) -> AsyncIterator[tuple[Reads, Answers]]:
    """What answers operators, from the last status and from the history, each on a pool of its own."""
    pool = await database.pool(
        application="nexhb reads",
        size=settings.database.read_pool_size,
        timeout_s=settings.database.read_timeout_seconds,
    )
    legacy_pool = await database.pool(
        application="nexhb legacy reads",
        size=settings.reads.legacy_pool_size,
        timeout_s=settings.reads.legacy_timeout_seconds,
        **LEGACY_SESSION,
    )
    lives.on_change(partial(_leave, pool, legacy_pool))
    interval = timedelta(seconds=settings.heartbeat.interval_seconds)
    from_history = FromHistory(timedelta(days=settings.partitions.retention_days))
    try:
        yield Reads(pool, interval), Answers(legacy_pool, from_history, interval)
    finally:
        legacy_pool.terminate()
        pool.terminate()


def _leave(*pools: db.Pool) -> None:
    """Another database was found: what these pools hold leads to the one before."""
    for pool in pools:
        task = asyncio.ensure_future(pool.expire_connections())
        _leaving.add(task)
        task.add_done_callback(_leaving.discard)


_leaving: set[asyncio.Future[None]] = set()  # a task that nobody holds may be collected


def _renew_tls(secure: ssl.SSLContext | None, settings: Server, state: State) -> bool:
    renewed = secure is None or tls.renew(secure, settings)
    state.remark = "" if renewed else "the certificate could not be renewed, see the log"
    return renewed


def _stopping(state: State) -> None:
    state.reasons["stopping"] = "The daemon is stopping."
    metrics.ready.set(0)


def _status(state: State, intake: Intake, writer: Writer) -> str:
    """For `systemctl status`."""
    reasons = " ".join(state.not_ready(intake, in_full=True))
    committed = (
        f"{datetime.fromtimestamp(writer.committed_at, UTC):%Y-%m-%d %H:%M:%S} UTC" if writer.committed_at else "none"
    )
    said = [f"NOT READY: {reasons}" if reasons else "ready", f"queue {intake.items}", f"last commit {committed}"]
    return "; ".join([*said, state.remark] if state.remark else said)


async def _keep_telling(manager: notify.Notifier, writer: Writer, state: State, status: Callable[[], str]) -> None:
    """How we are, and that we live: the watchdog is fed only while the writer comes further. Never returns."""
    silent = 0  # looks in a row: at the first, the whole process may have stood still
    while True:
        await asyncio.sleep(min(STATUS_S, (manager.watchdog_s or 3600.0) / 3))
        silent = silent + 1 if writer.silent_s > writing.SILENT_MOST_S else 0
        hangs = silent > 1
        state.reasons["writer"] = "The writer hangs." if hangs else ""
        if silent == 2:
            _log.error("writer.hangs", silent_s=round(writer.silent_s), where=_where("writer"))
        feed = {} if hangs or manager.watchdog_s is None else {"WATCHDOG": 1}
        manager.send(**feed, STATUS=status())


def _where(name: str) -> list[str]:
    """Where a task waits, from the outside in."""
    found: list[str] = []
    task = next((one for one in asyncio.all_tasks() if one.get_name() == name), None)
    waits: Any = task and task.get_coro()
    while waits is not None:
        frame = getattr(waits, "cr_frame", None)
        found.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else type(waits).__name__)
        waits = getattr(waits, "cr_await", None)
    return found


async def _prepare(database: Database, settings: Settings, state: State, now: Callable[[], datetime]) -> None:
    """Schema and partitions, and whether the database keeps what it commits. A database that goes away meanwhile is
    waited for as one that is not there yet."""
    until_s = time.monotonic() + START_PATIENCE_S
    while True:
        conn = await _connect_patiently(database, until_s)
        try:
            _refuse_pooler(await _look_at_settings(conn, settings, state))
            if isinstance(now, DatabaseClock):
                await now.learn(conn)
            _note_clock(state, now)
            await migrate.migrate(conn, now())
            await db.check_tables(conn)
            await partitions.ensure(conn, window_days(settings, now()))
            await numbers.raise_sequences(conn)
        except Exception as error:
            if isinstance(error, DatabaseUnfit) or classify(error) is not Kind.LOST or time.monotonic() > until_s:
                raise
            _log.warning("database.waiting", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
        else:
            return
        finally:
            await conn.close(timeout=5)


def _note_clock(state: State, now: Callable[[], datetime]) -> None:
    """Not ready while this host's clock and the database's are far apart: one of them is wrong, and another daemon may
    agree with the database. Heartbeats that come are taken, at the database's time."""
    because = clock.apart_because(now.apart) if isinstance(now, DatabaseClock) else ""
    if because and not state.reasons.get("clock"):
        _log.warning("clock.apart", why=because)
    state.reasons["clock"] = because


def _refuse_pooler(found: list[db.Finding]) -> None:
    if db.POOLER in found:
        raise PoolerBetween  # a migration would take its lock in one session, and give it back in another


async def _look_at_settings(conn: db.Connection, settings: Settings, state: State) -> list[db.Finding]:
    """What is found, said in /readyz and the log."""
    found = await db.unsafe_settings(conn)
    before = state.reasons.pop("unsafe", "")
    if db.POOLER in found or (found and not settings.database.accept_unsafe_settings):
        said = "; ".join(map(str, found))
        state.reasons["unsafe"] = f"The database does not keep what it commits: {said}."
    if state.reasons.get("unsafe", "") != before:
        _log.error("database.unsafe", found=[str(one) for one in found])
    return found


async def _keep_looking_at_settings(settings: Settings, database: Database, state: State) -> None:
    """Somebody may turn fsync off, or on again, while the daemon runs."""
    while True:
        await asyncio.sleep(SETTINGS_S)
        try:
            async with database.connected(application="nexhb settings", command_timeout_s=10) as conn:
                await _look_at_settings(conn, settings, state)
        except Exception as error:
            # Away, or restarting: the writer finds that out by itself, and says so.
            _log.info("database.settings_not_read", error=f"{type(error).__name__}: {error}")


async def _watch_disk(settings: Settings, state: State) -> None:
    """Hold the intake while the embedded PostgreSQL's disk runs full, of bytes or of inodes: 503 is better than a
    PostgreSQL that panics."""
    of = settings.database
    while of.url is None:
        try:
            room = await asyncio.to_thread(disk.room_at, settings.data_dir)
        except (OSError, RuntimeError, MemoryError) as error:  # a thread cannot be started either
            _log.error("disk.not_seen", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(DISK_S)
            continue
        metrics.disk_free.set(room.free_bytes)
        metrics.disk_free_inodes.set(room.free_inodes if room.inodes else nan)
        before = state.reasons.get("disk", "")
        low = room.low(reserve_bytes=of.disk_reserve_bytes, reserve_inodes=of.disk_reserve_inodes, held=bool(before))
        if bool(low) != bool(before):
            event = "disk.low" if low else "disk.enough_again"
            _log.error(
                event, free_bytes=room.free_bytes, reserve_bytes=of.disk_reserve_bytes, free_inodes=room.free_inodes
            )
        state.reasons["disk"] = str(low) if low else ""
        await asyncio.sleep(DISK_S)
    metrics.disk_free.set(nan)  # somebody else's disk: a 0 would be an alert
    metrics.disk_free_inodes.set(nan)
    await asyncio.Event().wait()


def window_days(settings: Settings, now: datetime) -> list[Any]:
    """The days that heartbeats may fall into, and those made ahead."""
    first = (now - settings.ingest.accept_past).date()
    return partitions.days_between(first, now.date() + timedelta(days=settings.partitions.days_ahead))


async def _connect_patiently(database: Database, until_s: float) -> db.Connection:
    """A connection, by the host's monotonic clock until `until_s` if the database is not there yet."""
    while True:
        try:
            return await database.connect(application="nexhb start", lock_timeout="30000")
        except DatabaseUnavailable as error:
            # A wrong password, a database that does not exist, one that is not fit or a pooler will not mend itself.
            if (
                time.monotonic() > until_s
                or isinstance(error, DatabaseUnfit)
                or not is_retryable(error.__cause__ or error)
            ):
                raise
            _log.warning("database.waiting", error=str(error))
            await asyncio.sleep(1)


async def _sweep(settings: Settings, intake: Intake, state: State, connections: Connections) -> None:
    """Twice a second: answer what has waited too long, cut what takes too long to ask."""
    loop = asyncio.get_running_loop()
    lost = 0
    while True:
        due = loop.time() + SWEEP_S
        await asyncio.sleep(SWEEP_S)
        try:
            metrics.loop_lag.observe(max(0.0, loop.time() - due))
            intake.expire(loop.time(), settings.ingest.answer_within_seconds)
            intake.observe()
            metrics.log_lines_lost.inc(log.lines_lost() - lost)
            lost = log.lines_lost()
            intake.held_because = state.hold
            connections.sweep(loop.time())
            metrics.ready.set(0 if state.not_ready(intake) else 1)
        except MemoryError:
            _log.error("sweep.no_memory")  # half a second later it looks again


async def _keep_days_ahead(settings: Settings, database: Database, now: Callable[[], datetime]) -> None:
    """Every hour: the days ahead. The nightly run makes them too; a fleet must not stand still should that be off."""
    while True:
        await asyncio.sleep(3600)
        try:
            async with database.connected(application="nexhb partitions") as conn:
                await partitions.ensure(conn, window_days(settings, now()))
        except Exception:
            # Days stand ahead for two weeks, and the writer makes the one it needs: an hour later is soon enough.
            _log.exception("partition.ensure_failed")


@asynccontextmanager
async def _side_task(
    name: str, work: Coroutine[Any, Any, None], failed: asyncio.Future[BaseException]
) -> AsyncIterator[None]:
    """A task beside the server. One that ends by itself stops the daemon: half a daemon is worse than none."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not failed.done():
            failed.set_result(task.exception() or RuntimeError(f"the task {name} came to its end"))

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


@asynccontextmanager
async def _troubles(
    database: Database, settings: Settings, now: Callable[[], datetime], lives: identity.Lives,
    failed: asyncio.Future[BaseException],
) -> AsyncIterator[Troubles]:  # fmt: skip
    """What is seen to go wrong with devices, written now and then for the block."""
    troubles = Troubles(database, now, settings.ingest.bucket_seconds)
    lives.on_change(troubles.forget)
    async with _side_task("troubles", troubles.run(), failed):
        yield troubles


@asynccontextmanager
async def _serving(parts: Parts, connections: Connections, tls: ssl.SSLContext | None) -> AsyncIterator[list[int]]:
    """Accept connections for the block; the ports. On the way out no new request is taken, those under way finish."""
    settings = parts.settings.server
    runner = web.AppRunner(make_app(parts), shutdown_timeout=settings.shutdown_timeout_seconds)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - it is set up
    factory = connections.factory(
        runner.server, Express(parts), tls, access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False,
        lingering_time=LINGER_S,
    )  # fmt: skip
    listeners: list[asyncio.Server] = []
    try:
        listeners.append(await _listen(factory, settings, "port"))
        if settings.instance_port is not None:
            listeners.append(await _listen(factory, settings, "instance_port"))
        yield [int(one.sockets[0].getsockname()[1]) for one in listeners]
    finally:
        for one in listeners:
            one.close()
        connections.cut_handshakes()
        await runner.cleanup()


async def _listen(factory: Callable[[], asyncio.BaseProtocol], settings: Server, key: str) -> asyncio.Server:
    """On server.host and the port that `key` names; only server.port is ever shared. Raises ConfigError, or
    CannotListen where another setting is not the only remedy."""
    port, shared = getattr(settings, key), settings.reuse_port and key == "port"
    try:
        return await asyncio.get_running_loop().create_server(
            factory, settings.host.strip("[]"), port, backlog=4096, reuse_port=shared or None
        )
    except OSError as error:
        raise listening.refusal(error, settings.host, key, port) from error


def _urls(settings: Server, ports: list[int]) -> tuple[str, str | None]:
    first, *own = [url_of(settings, port) for port in ports]
    return first, own[0] if own else None


def url_of(settings: Server, port: int) -> str:
    """Where a program on this host reaches what listens as these settings say, on `port`."""
    host = settings.host.strip("[]")
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http{'s' if settings.tls_cert_file else ''}://{shown}:{port}"


def raise_open_files_limit() -> None:
    """As many open files as the hard limit allows: each device keeps a connection, and the usual soft limit of 1,024
    would cut off half of a fleet of 2,000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MOST if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < 4096:
        _log.warning("daemon.few_open_files", limit=wanted, hint="Raise it: ulimit -n, or LimitNOFILE in the unit.")


def connections_most(wanted: int) -> int:
    """As many connections as there may be open files for, our own set aside: what takes the last one takes it from
    the database's connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(10, soft - OWN_FILES))
    if most < wanted:
        _log.warning("daemon.fewer_connections", connections=most, connections_max=wanted, open_files=soft)
    return most


async def serve(settings: Settings, ready: Callable[[Running], None]) -> int:
    """Run until SIGTERM or SIGINT, also while it still starts; the exit code. `ready` is called once heartbeats are
    taken."""
    raise_open_files_limit()
    log.take_over()
    manager = notify.Notifier.from_environment(os.environ)
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        async with AsyncExitStack() as stack:
            starting = asyncio.ensure_future(stack.enter_async_context(running(settings, manager=manager)))
            await _started(starting, stopped, manager)
            if not starting.done():
                manager.send(STOPPING=1)
                starting.cancel()
                await asyncio.wait((starting,))
                return 0
            daemon = starting.result()
            _log.info(
                "daemon.started", version=__version__, url=daemon.url, instance_url=daemon.instance_url,
                host=socket.gethostname(),
            )  # fmt: skip
            ready(daemon)
            manager.send(READY=1, STATUS=daemon.status())
            await stack.enter_async_context(
                _side_task("reload", _keep_reloading(reload, daemon, manager), daemon.failed)
            )
            gc.freeze()  # what stands now stands until the end
            gc.set_threshold(20_000, 20, 50)  # at 700 objects the collector took 4 % of a full core, and found nothing
            await asyncio.wait((stopped, daemon.failed), return_when=asyncio.FIRST_COMPLETED)
            _log.info("daemon.stopping")
            manager.send(STOPPING=1, STATUS="Stopping.")
    except NexhbError as error:
        _log.error("daemon.not_started", error=str(error))
        manager.send(STATUS=f"Not started: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except FROM_THE_DATABASE as error:
        # The database went away between its first answer and our last question: whoever started us starts us again.
        _log.error("daemon.not_started", error=f"{type(error).__name__}: {error}")
        manager.send(STATUS="Not started: the database went away.")
        return 1
    finally:
        stopped.cancel()
    if daemon.failed.done():
        _log.error("daemon.part_died", exc_info=daemon.failed.result())
        return 1
    _log.info("daemon.stopped")
    return 0


async def _started(starting: asyncio.Future[Running], stopped: asyncio.Future[Any], manager: notify.Notifier) -> None:
    """Wait until it has started or is to stop; a start that is slow, by crash recovery, a migration or a database that
    is away, asks the service manager for time."""
    until_s = time.monotonic() + ASKED_MOST_S
    waiting: set[asyncio.Future[Any]] = {starting, stopped}
    while len(waiting) == 2 and time.monotonic() < until_s:
        manager.ask_for_time(ASKED_S)
        _, waiting = await asyncio.wait(waiting, timeout=ASK_S, return_when=asyncio.FIRST_COMPLETED)
    if len(waiting) == 2:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


async def _keep_reloading(wanted: asyncio.Event, daemon: Running, manager: notify.Notifier) -> None:
    """On SIGHUP, also on one that came while we started. Never returns."""
    while True:
        await wanted.wait()
        wanted.clear()
        manager.reloading()
        daemon.renew_tls()
        manager.send(READY=1, STATUS=daemon.status())
