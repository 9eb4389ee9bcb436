"""Run `python -m tests.fuzz --bodies 1000000`. Exit code 0 if no response was wrong and memory did not grow."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import uvloop

from tests.fuzz.run import Result, daemon, fuzz


def main() -> int:
    """Send the bodies, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()

    def progress(result: Result) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{result.bodies:,} of {options.bodies:,}")

    with daemon() as target, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(fuzz(target, options.bodies, options.seed, progress))
    elapsed_s = time.monotonic() - started
    sys.stdout.write(f"{result.bodies:,} bodies in {elapsed_s:.0f} s, seed {options.seed}\n")
    for status, count in sorted(result.statuses.items()):
        sys.stdout.write(f"  {status}: {count:,}\n")
    sys.stdout.write(f"  connections closed by the daemon: {result.closed:,}\n")
    sys.stdout.write(
        f"  memory: {result.settled_rss >> 20} MiB when settled, {result.growth / 2**20:+.1f} MiB at the end\n"
    )
    for violation in result.violations:
        sys.stdout.write(f"  WRONG: {violation}\n")
    sys.stdout.write("passed: no response is wrong, and memory did not grow\n" if result.passed else "FAILED\n")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
