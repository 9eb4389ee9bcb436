"""The import from NexMDM while the fleet of scenario 1 sends: its rate, and what the fleet feels of it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import asyncpg
import orjson
import typer
import uvloop

from bench import nexmdm, progress, stack
from bench.fleet import make_fleet, schedule
from bench.load import LoadRun, open_loop, target
from bench.report import ALL_ACKNOWLEDGED, Limit, hold, judge, say_broken, table
from bench.scenarios import FLOORS
from nexhb.partitions import midnight

_SEED: Final = 1
_ITS_SEED: Final = 2  # of the old system's fleet: other devices than those that send
_DATABASE: Final = "nexmdm"
_MOST_S: Final = 7200.0


@dataclass(frozen=True)
class _Old:
    """The old system, and how fast it is read."""

    devices: int
    days: int
    interval_s: int
    version: nexmdm.Version
    rate: int


def moving(  # noqa: PLR0917 - typer reads each option from a parameter
    devices: Annotated[int, typer.Option(min=1, help="Of the old system, and as many others that send.")] = 500,
    days: Annotated[int, typer.Option(min=1, max=80, help="Of its history.")] = 7,
    interval: Annotated[int, typer.Option(min=10, help="Seconds between a device's heartbeats.")] = 60,
    rate: Annotated[int, typer.Option(min=1, help="The import's --rate.")] = 10_000,
    partitioned: Annotated[bool, typer.Option("--partitioned", help="A table a day, without an index on ts.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result there too.")] = None,
) -> None:
    """Import a NexMDM history under load. Exit 0: both sides agree, and every limit of the load was kept."""
    console = progress.console()
    fleet = make_fleet(devices, _SEED)
    version = nexmdm.PARTITIONED if partitioned else nexmdm.MONOLITHIC
    old = _Old(devices, days, interval, version, rate)
    try:
        with stack.running(fleet) as own:
            run, imported = uvloop.run(_both(own, old))
    except stack.StackError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    result = judge(run.result, (*ALL_ACKNOWLEDGED, *FLOORS))
    agrees = hold(Limit("both sides agree", "", 1, "at_least"), int(imported["agrees"]))
    console.print(table(result))
    beats, seconds = imported["heartbeats"], imported["seconds"]
    console.print(
        f"{version.name}: {beats['source']:,} rows of {devices:,} devices, {days} days; {beats['written']:,} written "
        f"in {seconds:,.0f} s, {beats['written'] / max(seconds, 0.1):,.0f}/s of {rate:,}/s at most; "
        f"both sides agree: {imported['agrees']}"
    )
    if json is not None:
        kept = {"version": version.name, "rate": rate, "import": imported, "load": asdict(result)}
        json.write_bytes(orjson.dumps(kept, default=str, option=orjson.OPT_INDENT_2))
        console.print(f"Result in {json}.", soft_wrap=True, highlight=False)
    verdicts = (*result.verdicts, agrees)
    say_broken(console, verdicts)
    raise typer.Exit(0 if all(verdict.ok for verdict in verdicts) else 1)


async def _both(own: stack.Stack, old: _Old) -> tuple[LoadRun, dict[str, Any]]:
    source = own.dsn_of(_DATABASE)
    await _fill(own, source, old)
    fleet, over = make_fleet(old.devices, _SEED), asyncio.Event()
    plan = schedule(old.devices, 60, 0, _MOST_S, _SEED)
    load = asyncio.create_task(open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, until=over))
    try:
        await asyncio.sleep(5)
        words = ("import-legacy", "--source", source, "--days", f"{old.days}", "--rate", f"{old.rate}", "--json")
        imported = await asyncio.to_thread(lambda: own.command(*words, timeout_s=_MOST_S))
    finally:
        over.set()
        run = await load
    return run, imported


async def _fill(own: stack.Stack, source: str, old: _Old) -> None:
    """The old system's database, on the same server."""
    conn = await own.connect()
    try:
        await conn.execute(f"CREATE DATABASE {_DATABASE}")
    finally:
        await conn.close(timeout=5)
    conn = await asyncpg.connect(source, command_timeout=_MOST_S)
    try:
        now = datetime.now(UTC)
        first = midnight(now.date() - timedelta(days=old.days))
        await old.version.create(conn, first, now)
        await nexmdm.add_devices(conn, [(d.device_id, d.token) for d in make_fleet(old.devices, _ITS_SEED)])
        await nexmdm.add_history(conn, first, now - timedelta(minutes=20), timedelta(seconds=old.interval_s))
        await conn.execute("VACUUM ANALYZE")
    finally:
        await conn.close(timeout=5)
