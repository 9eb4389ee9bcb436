"""Run `python -m bench.sim --seed 1 --days 14`. The last line is the verdict; exit code 1: a difference was found."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from bench.sim.compare import differences
from bench.sim.play import Found, play
from bench.sim.script import Script, write
from nexhb import log
from nexhb.postgres import embedded, migrate
from nexhb.postgres.connections import Database

SHOWN = 40


def main() -> None:
    """Simulate the script of a seed, and print every difference."""
    parser = argparse.ArgumentParser(prog="python -m bench.sim", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--kiosks", type=int, default=500)
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--every-round", action="store_true", help="leave out no round of the watcher")
    args = parser.parse_args()
    log.setup("error")
    script = write(args.seed, args.days, args.kiosks, args.sites)
    folder = Path(tempfile.mkdtemp(prefix="nexhb-drama-"))
    folder.chmod(0o711)  # if root runs this, PostgreSQL's own user needs access
    began = time.monotonic()
    try:
        found = uvloop.run(_play(script, folder, every_round=args.every_round))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    played = time.monotonic()
    wrong = differences(script, found)
    for line in wrong[:SHOWN]:
        print(line)
    print(
        f"{found.heartbeats:,} heartbeats, {found.rounds:,} rounds, {len(found.events):,} events,"
        f" {len(found.outages):,} outages, {len(found.incidents):,} incidents, {len(found.offline):,} samples of the"
        f" presence; {played - began:.0f} s, and {time.monotonic() - played:.0f} s to compare."
    )
    print(f"Seed {args.seed}: " + (f"{len(wrong)} differences." if wrong else "no difference."))
    sys.exit(1 if wrong else 0)


async def _play(script: Script, folder: Path, *, every_round: bool) -> Found:
    with embedded.start(folder / "data") as server:
        database = Database(server.dsn)
        conn = await database.connect(application="sim")
        await migrate.migrate(conn, datetime.now(UTC))
        for setting in ("fsync = off", "full_page_writes = off", "autovacuum_naptime = '10s'"):
            await conn.execute(f"ALTER SYSTEM SET {setting}")
        await conn.fetchval("SELECT pg_reload_conf()")
        await conn.close()
        return await play(script, database, every_round=every_round)


if __name__ == "__main__":
    main()
