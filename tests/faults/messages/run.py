"""A run: a daemon with its database, a fleet whose incidents open and resolve, a receiver, and kills."""

from __future__ import annotations

import asyncio
import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import aiohttp
import asyncpg

from bench.fleet import Device, make_fleet, write_csv
from nexhb.clock import system_now
from nexhb.devices import csv_import
from tests.faults import background
from tests.faults.cluster import Cluster, running
from tests.faults.daemon import Daemon
from tests.faults.guard import Guard, guarding
from tests.faults.messages import check
from tests.faults.messages.kills import LANES, READY_S, Killer, wait_until
from tests.faults.messages.receiver import Arrival, Receiver, receiving
from tests.faults.messages.script import KIOSKS_PER_SITE, Incidents, Kiosk, Script
from tests.faults.messages.variants import REAL
from tests.support.receiver import SECRET

ROUTES = ("pager", "log")
SELF_ROUTE = "nexhb"
STALLED_S = 15.0  # the script is stuck if no message arrives for so long after the last kill
LEASE_S = 45.0  # of nexhb/messages/delivery.py, before it is scaled
MARGIN_S = 20.0
SITES_AT_ONCE = 3


@dataclass
class Outcome:
    """What a run did, and which promises were broken."""

    seed: int
    violations: list[str] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    hit: int = 0  # kills with a request in flight
    incidents: int = 0
    messages: int = 0
    doubles: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A run: the seed determines the kills."""

    seed: int
    kills: int
    batteries: int = 24  # kiosks whose battery fails again and again
    scale: float = 0.1  # of nexhb's timeouts, leases and pauses
    told_after_s: float = 12.0  # when routes are told that nexhb is not ready
    variant: str = REAL
    lanes: Sequence[str] = LANES  # what is killed


async def run(plan: Plan, *, template: Path | None = None, log: Path | None = None) -> Outcome:
    """Kill during deliveries, then take the database away; let everything recover, and check. `template`: as in
    `cluster.running`. If a promise was broken, copy the daemon's log to `log`."""
    outcome, began = Outcome(plan.seed), time.monotonic()
    with guarding() as guard:
        async with running(guard, template) as cluster, receiving(plan.seed) as receiver, AsyncExitStack() as stack:
            sites = max(SITES_AT_ONCE, plan.kills)
            fleet = make_fleet(plan.batteries + sites * KIOSKS_PER_SITE, plan.seed)
            await _register(cluster, fleet, plan.batteries)
            daemon = await stack.enter_async_context(_serving(guard, cluster, receiver, plan))
            if await daemon.ready(READY_S) is None:
                last = daemon.log_path.read_text(errors="replace")[-2000:]
                return Outcome(plan.seed, [f"stuck: the daemon was not ready after its first start: {last}"])
            killer = Killer(cluster, daemon, receiver)
            incidents = Incidents(cluster.dsn, len(ROUTES))
            http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
            script = Script(incidents, http, random.Random(f"nexhb script:{plan.seed}"))  # noqa: S311 - a simulation
            kiosks = [Kiosk(device.device_id, device.token, daemon.url) for device in fleet]
            async with background.running(incidents.follow()):
                await _live(outcome, killer, script, kiosks, plan)
            await _check(outcome, cluster, receiver, script)
            outcome.kills, outcome.hit = dict(killer.done), killer.hit.total()
            if outcome.violations and log is not None:
                await asyncio.to_thread(shutil.copy, daemon.log_path, log)
    outcome.seconds = time.monotonic() - began
    return outcome


async def _live(outcome: Outcome, killer: Killer, script: Script, kiosks: Sequence[Kiosk], plan: Plan) -> None:
    of_sites = kiosks[plan.batteries :]
    by_site = [of_sites[at : at + KIOSKS_PER_SITE] for at in range(0, len(of_sites), KIOSKS_PER_SITE)]
    slots = [
        {f"site-{number}": by_site[number] for number in range(slot, len(by_site), SITES_AT_ONCE)}
        for slot in range(SITES_AT_ONCE)
    ]
    cases = [asyncio.create_task(script.battery(kiosk)) for kiosk in kiosks[: plan.batteries]]
    # Until most kiosks are known, those of a site would be over half of the fleet.
    await wait_until(lambda: len(script.required) > plan.batteries // 2, READY_S)
    cases += [asyncio.create_task(script.sites(slot)) for slot in slots]
    try:
        await killer.kill(plan.seed, plan.kills, plan.lanes)
        outcome.violations += await _without_database(killer, plan)
        script.stopping = True
        await _until_quiet(outcome, killer, cases, STALLED_S + 2 * LEASE_S * plan.scale)
    finally:
        for case in cases:
            case.cancel()
        results = await asyncio.gather(*cases, return_exceptions=True)
    outcome.violations += [f"wrong: {each}" for each in results if isinstance(each, Exception)]


async def _without_database(killer: Killer, plan: Plan) -> Sequence[str]:
    """Take the database away until the route of nexhb itself was told. Return the broken promises."""
    receiver = killer.receiver

    def about_itself(since: datetime | None = None) -> list[Arrival]:
        arrivals = (each for each in receiver.arrivals if each.route == SELF_ROUTE)
        return [each for each in arrivals if since is None or datetime.fromisoformat(each.data["since"]) >= since]

    def is_at_rest() -> bool:
        """Return whether the route was told of the end of each outage that a kill has caused."""
        ended = {each.data["since"] for each in about_itself() if each.type == "nexhb.ready"}
        return ended >= {each.data["since"] for each in about_itself()}

    if not await wait_until(is_at_rest, MARGIN_S):
        return ["lost: a route was not told of the end of an outage that a kill has caused"]
    # An outage that a kill has caused a moment ago may go on as this one; one that was told began earlier.
    since = system_now() - timedelta(seconds=plan.told_after_s)
    if await killer.take_database_away(lambda: bool(about_itself(since)), plan.told_after_s + MARGIN_S):
        await wait_until(lambda: any(each.type == "nexhb.ready" for each in about_itself(since)), MARGIN_S)
    return list(check.of_outage(about_itself(since)))


async def _until_quiet(outcome: Outcome, killer: Killer, cases: Sequence[asyncio.Task[None]], stalled_s: float) -> None:
    """Wait until the script has ended and the outbox is empty."""
    arrived, changed_at = -1, time.monotonic()
    async with asyncpg.create_pool(killer.cluster.dsn, min_size=0, max_size=1) as pool:
        while not all(case.done() for case in cases) or await pool.fetchval(check.HAS_PENDING):
            if len(killer.receiver.arrivals) > arrived:
                arrived, changed_at = len(killer.receiver.arrivals), time.monotonic()
            if time.monotonic() - changed_at > stalled_s:
                left = sum(not case.done() for case in cases)
                outcome.violations.append(f"stuck: nothing arrived for {stalled_s:.0f} s; {left} kiosks are not done")
                return
            await asyncio.sleep(0.2)


async def _check(outcome: Outcome, cluster: Cluster, receiver: Receiver, script: Script) -> None:
    conn = await asyncpg.connect(cluster.dsn, timeout=10)
    try:
        outbox, incidents = await conn.fetch(check.OUTBOX), await conn.fetch(check.INCIDENTS)
    finally:
        await conn.close()
    outcome.violations += check.violations(script.required, ROUTES, outbox, incidents, receiver.arrivals)
    if receiver.forged:
        outcome.violations.append(f"wrong: {receiver.forged} requests had a wrong signature")
    outcome.incidents, outcome.messages = len(incidents), len(outbox)
    outcome.doubles = check.doubles(receiver.arrivals)


async def _register(cluster: Cluster, fleet: Sequence[Device], batteries: int) -> None:
    """Add the devices; those after the first `batteries` have sites."""
    text = io.StringIO()
    write_csv(fleet, text)
    conn = await asyncpg.connect(cluster.dsn, timeout=10)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            file.write(text.getvalue())
            file.flush()
            await csv_import.import_csv(conn, Path(file.name))
        ids = [device.device_id for device in fleet[batteries:]]
        sites = [f"site-{number // KIOSKS_PER_SITE}" for number in range(len(ids))]
        await conn.execute("INSERT INTO sites (site) SELECT DISTINCT unnest($1::text[])", sites)
        await conn.execute(
            "UPDATE devices d SET site = n.site FROM unnest($1::text[], $2::text[]) AS n (device_id, site) "
            "WHERE d.device_id = n.device_id",
            ids, sites,
        )  # fmt: skip
    finally:
        await conn.close()


@asynccontextmanager
async def _serving(guard: Guard, cluster: Cluster, receiver: Receiver, plan: Plan) -> AsyncIterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="nexhb-faults-"))
    guard.report("folder", folder)
    common = {"secret": SECRET, "allow_private": True}
    routes = [
        {"name": name, "url": f"{receiver.url}/{name}", "match": {"kinds": ["unity_down", "battery_low"]}} | common
        for name in ROUTES
    ]
    own = {"name": SELF_ROUTE, "url": f"{receiver.url}/{SELF_ROUTE}", "match": {"kinds": []}, "self": True}
    settings = {
        "NEXHB_DATABASE__URL": cluster.dsn,
        "NEXHB_WATCH__INTERVAL_SECONDS": "0.25",
        "NEXHB_INGEST__BUCKET_SECONDS": "1",
        "NEXHB_HEARTBEAT__OFFLINE_AFTER_SECONDS": "86400",  # a kiosk sends only when its content changes
        "NEXHB_NOTIFY__ROUTES": json.dumps([*routes, own | common]),
    }
    entry = ("tests.faults.messages.variants", plan.variant, f"{plan.scale:g}", f"{plan.told_after_s:g}")
    async with Daemon(folder, guard, settings, entry).supervised() as daemon:
        daemon.keep_running()
        yield daemon
