"""`make demo`: a fleet of 2,000 devices for a minute against a daemon of its own, then every row compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop
from rich.console import Console

from bench import progress, stack
from bench.fleet import Device, Schedule, make_fleet, schedule
from bench.load import open_loop, target
from bench.report import ALL_ACKNOWLEDGED
from bench.trial import Trial, examine

_INTERVAL_S: Final = 60.0
_SEED: Final = 1


def demo(
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 2000,
    duration: Annotated[float, typer.Option(min=1, help="Seconds; within each minute every device sends.")] = 60.0,
    data_dir: Annotated[Path | None, typer.Option(help="An empty folder that is kept, to look into.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result there too.")] = None,
) -> None:
    """Run a daemon and a simulated fleet, compare every row. Exit 0: all acknowledged, all there."""
    console = progress.console()
    fleet = make_fleet(devices, _SEED)
    # without jitter, so that each device sends exactly once in every interval
    plan = schedule(devices, _INTERVAL_S, 0, duration, _SEED)
    console.print(f"Starting a daemon with an embedded PostgreSQL, and making {devices:,} devices known …")
    try:
        with stack.running(fleet, data_dir=data_dir) as own:
            _say_where(console, own, devices, duration)
            trial = uvloop.run(_load(own, fleet, plan))
    except stack.StackError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    _report(console, trial, data_dir)
    if json is not None:
        trial.write(json)
    raise typer.Exit(0 if trial.ok else 1)


async def _load(own: stack.Stack, fleet: tuple[Device, ...], plan: Schedule) -> Trial:
    with progress.line(len(plan), "heartbeats acknowledged") as show:
        run = await open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, progress=show)
    return await examine(own, fleet, run, ALL_ACKNOWLEDGED)


def _say_where(console: Console, own: stack.Stack, devices: int, duration_s: float) -> None:
    console.print(
        f"It serves {own.url}; {devices:,} devices send for {duration_s:g} s. Meanwhile, from another terminal:\n"
        f'  curl -sS -H "x-admin: $(cat {own.data_dir}/admin_key)" {own.url}/v1/fleet\n'
        f'  curl -sS -H "x-admin: $(cat {own.data_dir}/admin_key)" "{own.url}/v1/devices/unity-down?limit=3"',
        highlight=False,
        soft_wrap=True,
    )


def _report(console: Console, trial: Trial, data_dir: Path | None) -> None:
    trial.show(console)
    result, memory = trial.result, trial.memory
    answer = (
        "Every heartbeat was acknowledged, and every row is there." if trial.ok else "Something is wrong: see above."
    )
    console.print(
        f"{answer} Median answer {result.p50_ms} ms, 99 of 100 within {result.p99_ms} ms,\n"
        f"counted from the moment a heartbeat was due. The daemon took {memory.rss_mb:g} MB.\n"
        + (f"Its data stay in {data_dir}.\n" if data_dir else "The daemon is stopped and its data are removed.\n")
        + "To go on: `make run` for a daemon that stays, README.md for a first heartbeat and the reads,\n"
        "`make bench` for every scenario, bench/README.md for what the figures mean.",
        highlight=False,
        soft_wrap=True,
    )
