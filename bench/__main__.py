"""`python -m bench`: a fleet's load against nexhb, checked row by row, and the figures that decided its design."""

from __future__ import annotations

import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import uvloop

from bench import demo, progress, stack, suite
from bench import load as loads
from bench.compare.command import compare
from bench.curve.command import curve
from bench.daemons.command import daemons
from bench.fleet import Device, Schedule, make_fleet, read_csv, schedule, write_csv
from bench.micro.command import micro
from bench.report import ALL_ACKNOWLEDGED, Limit, Result, judge, say_broken, table, write_json
from bench.runs import idle, moving, outage, soak
from bench.scenarios import FLOORS
from bench.status.command import status
from bench.trial import Trial, examine

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

_OPEN_LIMITS = (*ALL_ACKNOWLEDGED, *FLOORS)
_CLOSED_LIMITS = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
Seed = Annotated[int, typer.Option(help="What the fleet and its schedule are made from.")]


@app.command()
def load(  # noqa: PLR0917 - typer reads each option from a parameter
    devices: Annotated[int, typer.Option(min=1, help="How many devices; with --tokens at most the file's.")] = 2000,
    interval: Annotated[float, typer.Option(help="Seconds between a device's heartbeats.")] = 60.0,
    jitter: Annotated[float, typer.Option(help="Each heartbeat up to so many seconds early or late.")] = 15.0,
    duration: Annotated[float, typer.Option(help="Seconds of load.")] = 60.0,
    replay_fraction: Annotated[float, typer.Option(help="Share of devices that come with a queue.")] = 0.0,
    duplicate_factor: Annotated[float, typer.Option(help="Sends per heartbeat, all in its bucket.")] = 1.0,
    url: Annotated[str | None, typer.Option(help="A server on a loopback address; else a daemon of one's own.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result there too.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="CSV of device_id,alias,token.")] = None,
    seed: Seed = 1,
    closed: Annotated[bool, typer.Option("--closed", help="As fast as it goes instead.")] = False,
    connections: Annotated[int | None, typer.Option(min=1, help="Connections shared by the devices.")] = None,
    pid: Annotated[int | None, typer.Option(help="The process behind --url, for its CPU time.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="An empty folder for the own daemon, kept.")] = None,
) -> None:
    """Send a fleet's heartbeats and report latencies from the intended send time. Exit 0: all limits kept.

    Without --url a daemon is started for the run, and every row is compared with what was acknowledged.
    """
    try:
        to = None if url is None else loads.target(url)
        fleet = _fleet(devices, seed, tokens)
        plan = schedule(
            len(fleet),
            interval,
            jitter,
            duration,
            seed,
            duplicate_factor=duplicate_factor,
            replay_fraction=replay_fraction,
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    work = _Load(fleet, plan, closed=closed, connections=connections, seed=seed)
    if to is not None:
        finish(judge(uvloop.run(work.run(to, pid)).result, work.limits), json)
    finish_own(work, data_dir, json)


@app.command()
def fleet(
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")],
    out: Annotated[Path, typer.Option(help="The CSV to write, mode 0600.")],
    seed: Seed = 1,
) -> None:
    """Write device_id,alias,token of a seeded fleet, for `nexhb devices import`."""
    out.touch(mode=0o600)
    with out.open("w", encoding="utf-8", newline="") as file:
        write_csv(make_fleet(devices, seed), file)
    progress.console().print(f"{devices:,} devices in {out}: nexhb devices import {out}", soft_wrap=True)


app.command()(demo.demo)
app.command("all")(suite.run_all)
app.command("archive")(suite.run_archive)
app.command("overload")(suite.run_overload)
app.command("import")(moving.moving)
app.command()(outage.outage)
app.command()(soak.soak)
app.command()(idle.idle)
app.command()(micro)
app.command()(compare)
app.command()(curve)
app.command()(status)
app.command()(daemons)


@dataclass(frozen=True, slots=True)
class _Load:
    """What the options of `load` ask for."""

    fleet: tuple[Device, ...]
    plan: Schedule
    closed: bool
    connections: int | None
    seed: int

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What must hold of the result."""
        return _CLOSED_LIMITS if self.closed else _OPEN_LIMITS

    def run(self, to: loads.Target, pid: int | None, show: loads.Progress | None = None) -> _Run:
        """The load, against a server."""
        if self.closed:
            return loads.closed_loop(
                to, self.fleet, connections=self.connections or 64, duration_s=self.plan.duration_s, pid=pid
            )
        return loads.open_loop(
            to, self.fleet, self.plan, connections=self.connections, pid=pid, seed=self.seed, progress=show
        )

    async def examined(self, own: stack.Stack) -> Trial:
        """The load, against a daemon of its own, and every row compared."""
        queued = sum(len(queue.made_us) for queue in self.plan.replays)
        with progress.line(len(self.plan) + queued, "heartbeats acknowledged") as show:
            run = await self.run(loads.target(own.url), own.pid, show)
        return await examine(own, self.fleet, run, self.limits)


_Run = Coroutine[object, object, loads.LoadRun]


def finish_own(work: _Load, data_dir: Path | None, json: Path | None) -> None:
    """Run against a daemon of its own, print, write, and leave with 0 if every limit was kept, 1 if not."""
    console = progress.console()
    try:
        with stack.running(work.fleet, data_dir=data_dir) as own:
            trial = uvloop.run(work.examined(own))
    except stack.StackError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    trial.show(console)
    if json is not None:
        trial.write(json)
    _leave(trial.result, json)


def finish(result: Result, json: Path | None) -> None:
    """Print the result, write it, and leave with 0 if every limit was kept, 1 if not."""
    progress.console().print(table(result))
    if json is not None:
        write_json(json, result)
    _leave(result, json)


def _leave(result: Result, json: Path | None) -> NoReturn:
    """Say where the result lies and what is wrong with it, and leave by its exit code."""
    console = progress.console()
    if json is not None:
        console.print(f"Result in {json}.", soft_wrap=True, highlight=False)
    say_broken(console, result.verdicts)
    raise typer.Exit(0 if result.verdicts_ok else 1)


def _fleet(devices: int, seed: int, tokens: Path | None) -> tuple[Device, ...]:
    """The devices: from a file, or from the seed alone."""
    if tokens is None:
        return make_fleet(devices, seed)
    with tokens.open(encoding="utf-8", newline="") as file:
        known = read_csv(file, seed)
    if len(known) < devices:
        raise ValueError(f"{tokens} holds {len(known)} devices, not {devices}")
    return known[:devices]


if __name__ == "__main__":
    # a terminated bench ends as an interrupted one does: its daemon stops, its folder goes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
