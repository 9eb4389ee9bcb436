"""The commands `load` (a load with your settings), `demo` (a fleet for a minute) and `fleet` (the tokens of a
fleet)."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import uvloop

from bench import stack
from bench.finding import figure, show, table_of, write_json
from bench.fleet import make_fleet, replays, schedule, write_csv
from bench.load import LoadRun, Scheduled, Target, agents, stream, target
from bench.report import ALL_ACKNOWLEDGED, FLOORS, Result, judge
from bench.trial import SEED, Trial, combined, examine, send

# heartbeats in the queue of a device that comes back, and how long such devices may take to send them
_REPLAY_QUEUE: Final = 30
_REPLAY_BOUND_S: Final = 30.0
_NOT_FIGURES: Final = ("mode", "devices", "duration_s", "statuses", "failures", "extra", "verdicts")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load`."""
    parser.description = (
        "Send a fleet's heartbeats and report latencies from the intended send time. Exit code 0: every limit was "
        "kept. Without --url a daemon is started for the run, and every row is compared with what was acknowledged."
    )
    add = parser.add_argument
    add("--devices", type=int, default=2000, help="number of devices")
    add("--interval", type=float, default=60.0, help="seconds between a device's heartbeats")
    add("--jitter", type=float, default=15.0, help="seconds by which a heartbeat may be early or late")
    add("--duration", type=float, default=60.0, help="duration of the load in seconds")
    add("--replay-fraction", type=float, default=0.0, help="share of devices that come with a queue")
    add("--duplicate-factor", type=float, default=1.0, help="sends per heartbeat, all in its bucket")
    add("--url", help="a server on a loopback address, instead of a daemon for the run")
    add("--json", type=Path, help="a file to which the result is written, too")
    add("--seed", type=int, default=SEED, help="seed of the fleet and of its schedule")
    parser.set_defaults(run=load)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument("--devices", type=int, default=2000, help="number of devices")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds; within each minute every device sends")
    parser.set_defaults(run=demo)


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fleet`."""
    parser.add_argument("--devices", type=int, required=True, help="number of devices")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write, mode 0600")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the fleet")
    parser.set_defaults(run=fleet)


def fleet(_: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Write the CSV of the fleet that the seed determines; return 0."""
    args.out.touch(mode=0o600)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        write_csv(make_fleet(args.devices, args.seed), file)
    show(f"{args.devices:,} devices in {args.out}: nexhb devices import {args.out}")
    return 0


def load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Send a load, to --url or to a daemon of its own; return 0 if every limit was kept, 1 if not."""
    devices, limits = make_fleet(args.devices, args.seed), (*ALL_ACKNOWLEDGED, *FLOORS)
    if args.devices < 1 or not 0 <= args.replay_fraction <= 1:
        parser.error("--devices must be at least 1, and --replay-fraction from 0 to 1")
    try:
        to = None if args.url is None else target(args.url)
        plan = schedule(
            args.devices, args.interval, args.jitter, args.duration, args.seed, duplicate_factor=args.duplicate_factor
        )
    except ValueError as error:
        parser.error(str(error))
    queues = replays(round(args.devices * args.replay_fraction), args.interval, _REPLAY_QUEUE, 1, args.seed)

    async def sent(to: Target, *pids: int) -> LoadRun:
        run = stream(to, Scheduled(to, devices, plan), plan.offset_us, duration_s=args.duration, pids=pids)
        if not queues:
            return await run
        # meanwhile returning devices send their queues as agents do
        replaying = agents(to, devices, queues=queues, bound_s=args.duration + _REPLAY_BOUND_S)
        replayed, scheduled = await asyncio.gather(replaying, run)
        both, extra = combined([replayed, scheduled]), replayed.result.extra
        figures = {f"replay_{name}": extra[name] for name in ("left", "drained_s")}
        return replace(both, result=both.result.with_extra(**figures))

    if to is not None:
        return _end(judge(uvloop.run(sent(to)).result, limits), args.json)
    with stack.running(devices) as own:
        run = uvloop.run(sent(target(own.url), own.pid))
        trial = uvloop.run(examine(own, devices, run, limits))
    return _end(trial.result, args.json, trial)


def demo(_: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run a daemon and a simulated fleet; return 0 if every heartbeat is acknowledged and stored, 1 if not."""
    devices = make_fleet(args.devices, SEED)
    # without jitter, so that each device sends exactly once in every interval
    plan = schedule(args.devices, 60.0, 0, args.duration, SEED)
    show(f"Starting a daemon with an embedded PostgreSQL, and importing {args.devices:,} devices …")
    with stack.running(devices) as own:
        curl = f'  curl -sS -H "x-admin: $(cat {own.data_dir}/admin_key)"'
        show(
            f"It serves {own.url}; {args.devices:,} devices send for {args.duration:g} s. Meanwhile, from another "
            f'terminal:\n{curl} {own.url}/v1/fleet\n{curl} "{own.url}/v1/devices/unity-down?limit=3"'
        )
        run = uvloop.run(send(own, devices, plan))
        trial = uvloop.run(examine(own, devices, run, ALL_ACKNOWLEDGED))
    code, result = _end(trial.result, None, trial), trial.result
    verdict = "Limits were broken: see above." if code else "Every heartbeat was acknowledged, and every row is there."
    show(
        f"{verdict} The median response came after {result.p50_ms} ms, 99 of 100 within {result.p99_ms} ms,\n"
        f"counted from the moment a heartbeat was due. The daemon needed {result.extra['daemon_rss_mb']:g} MB.\n"
        "The daemon is stopped, its data are removed.\n"
        "To go on: `make run` for a daemon that stays, README.md for a first heartbeat and the reads,\n"
        "`make bench` for every scenario, bench/README.md for what the figures mean."
    )
    return code


def _end(result: Result, json: Path | None, trial: Trial | None = None) -> int:
    """Print and write a result; return the exit code."""
    numbers = {name: value for name, value in asdict(result).items() if name not in _NOT_FIGURES}
    numbers |= {f"status {status}": number for status, number in result.statuses.items()}
    numbers |= {f"failed by {reason}": number for reason, number in result.failures.items()} | dict(result.extra)
    figures = {name: figure(value) for name, value in numbers.items()} | (trial.check.figures() if trial else {})
    show(f"[bold]{result.mode}: {result.devices:,} devices, {result.duration_s:g} s[/]")
    show(table_of(figures, result.verdicts))
    if json is not None:
        write_json(json, {**asdict(result), **({"check": asdict(trial.check)} if trial else {})})
        show(f"Result in {json}.")
    return 0 if all(verdict.ok for verdict in result.verdicts) else 1
