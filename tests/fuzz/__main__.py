"""`python -m tests.fuzz --bodies 1000000`: exit code 0 where no answer was wrong and memory stayed flat."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import uvloop

from tests.fuzz.run import Result, daemon, fuzz


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    started = time.monotonic()

    def progress(result: Result) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{result.bodies:,} of {wanted.bodies:,}")

    with daemon() as target, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(fuzz(target, wanted.bodies, wanted.seed, progress))
    took = time.monotonic() - started
    sys.stdout.write(f"{result.bodies:,} bodies in {took:.0f} s, seed {wanted.seed}\n")
    for status, count in sorted(result.statuses.items()):
        sys.stdout.write(f"  {status}: {count:,}\n")
    sys.stdout.write(f"  lines cut by the daemon: {result.cut:,}\n")
    sys.stdout.write(
        f"  memory: {result.settled_rss >> 20} MiB when settled, {result.growth / 2**20:+.1f} MiB at the end\n"
    )
    for broken in result.broken:
        sys.stdout.write(f"  WRONG: {broken}\n")
    sys.stdout.write("no answer is wrong, and memory is flat\n" if result.good else "BROKEN\n")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
