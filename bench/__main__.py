"""`python -m bench`: load against a server, and the fleet that sends it."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from bench import load as loads
from bench.fleet import Device, make_fleet, read_csv, schedule, write_csv
from bench.report import ALL_ACKNOWLEDGED, Limit, Result, judge, table, write_json
from bench.scenarios import FLOORS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

_OPEN_LIMITS = (*ALL_ACKNOWLEDGED, *FLOORS)
_CLOSED_LIMITS = (*ALL_ACKNOWLEDGED, Limit("nothing deduplicated", "deduplicated", 0))
Seed = Annotated[int, typer.Option(help="What the fleet and its schedule are made from.")]


@app.command()
def load(  # noqa: PLR0917 - typer reads each option from a parameter
    devices: Annotated[
        int, typer.Option(min=1, help="How many devices; with --tokens at most the file's.")
    ] = 2000,
    interval: Annotated[float, typer.Option(help="Seconds between a device's heartbeats.")] = 60.0,
    jitter: Annotated[float, typer.Option(help="Each heartbeat up to so many seconds early or late.")] = 15.0,
    duration: Annotated[float, typer.Option(help="Seconds of load.")] = 60.0,
    replay_fraction: Annotated[float, typer.Option(help="Share of devices that come with a queue.")] = 0.0,
    duplicate_factor: Annotated[float, typer.Option(help="Sends per heartbeat, all in its bucket.")] = 1.0,
    url: Annotated[str | None, typer.Option(help="The server, on a loopback address.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result there too.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="CSV of device_id,alias,token.")] = None,
    seed: Seed = 1,
    closed: Annotated[bool, typer.Option("--closed", help="As fast as it goes instead.")] = False,
    connections: Annotated[int | None, typer.Option(min=1, help="Connections shared by the devices.")] = None,
    pid: Annotated[int | None, typer.Option(help="The server's process, for its CPU time.")] = None,
) -> None:
    """Send a fleet's heartbeats and report latencies from the intended send time. Exit 0: all limits kept."""
    if url is None:
        raise typer.BadParameter("needed: http://127.0.0.1:PORT", param_hint="--url")
    try:
        to = loads.target(url)
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
    if closed:
        run = loads.closed_loop(to, fleet, connections=connections or 64, duration_s=duration, pid=pid)
        finish(judge(_run(run), _CLOSED_LIMITS), json)
    else:
        run = loads.open_loop(to, fleet, plan, connections=connections, pid=pid, seed=seed)
        finish(judge(_run(run), _OPEN_LIMITS), json)


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
    Console().print(f"{devices:,} devices in {out}: nexhb devices import {out}")


def finish(result: Result, json: Path | None) -> None:
    """Print the result, write it, and leave with 0 if every limit was kept, 1 if not."""
    Console(width=None if sys.stdout.isatty() else 100).print(table(result))
    if json is not None:
        write_json(json, result)
    raise typer.Exit(0 if result.verdicts_ok else 1)


def _run(run: Coroutine[object, object, loads.LoadRun]) -> Result:
    """Run a load on uvloop."""
    return uvloop.run(run).result


def _fleet(devices: int, seed: int, tokens: Path | None) -> tuple[Device, ...]:
    """The devices: from a file, or from the seed alone."""
    if tokens is None:
        return make_fleet(devices, seed)
    with tokens.open(encoding="utf-8", newline="") as file:
        known = read_csv(file, seed)
    if len(known) < devices:
        raise ValueError(f"{tokens} holds {len(known)} devices, not {devices}")
    return known[:devices]


# ── further commands: demo, all, micro, compare, each in a file of its own ───────────────────────────────
# from bench import demo; app.command()(demo.demo)


if __name__ == "__main__":
    app()
