"""Run `python -m tests.timelapse --days 200 --seed 1`. The run has its own PostgreSQL, which is deleted at the end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from nexhb import log
from nexhb.postgres import embedded, migrate
from nexhb.postgres.connections import Database
from tests.timelapse.checks import Check
from tests.timelapse.days import live
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.report import progress, show
from tests.timelapse.world import Settings, World


def main(
    days: Annotated[int, typer.Option(min=20, help="Simulated days.")] = 200,
    seed: Annotated[int, typer.Option(help="Determines the faults, their times and the heartbeats.")] = 1,
    retention: Annotated[int, typer.Option(min=8, help="The retention in days.")] = 90,
    minutes: Annotated[float, typer.Option(help="Fail if the run takes longer.")] = 5,
    log_file: Annotated[Path | None, typer.Option("--log", help="Write nexhb's log to this file.")] = None,
) -> None:
    """Simulate the days, then print the faults and the checks. Exit code 1: a check failed."""
    console = Console()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="nexhb-timelapse-"))
    folder.chmod(0o711)  # if root runs this, PostgreSQL's own user needs access
    try:
        with (log_file or folder / "nexhb.log").open("w") as stream:
            log.setup("info", stream)
            settings = Settings(seed=seed, days=days, retention_days=retention)
            world, results = uvloop.run(_run(settings, folder, minutes, console))
    except BrokenPromise as error:
        console.print("A promise of nexhb was broken.", style="red")
        console.print(f"{error}", highlight=False, markup=False)
        command = f"python -m tests.timelapse --days {days} --seed {seed} --retention {retention} --log FILE"
        console.print(f"To repeat the run: {command}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    passed = show(console, world, results, time.monotonic() - began)
    raise typer.Exit(0 if passed else 1)


async def _run(settings: Settings, folder: Path, minutes: float, console: Console) -> tuple[World, list[Check]]:
    with embedded.start(folder / "data") as server:
        conn = await Database(server.dsn).connect(application="timelapse")
        await migrate.migrate(conn, datetime.now(UTC))
        await conn.close()
        try:
            async with asyncio.timeout(minutes * 60):
                return await live(settings, server.dsn, folder, lambda world: progress(console, world))
        except TimeoutError:
            raise BrokenPromise(f"The run took more than {minutes:g} minutes.") from None


if __name__ == "__main__":
    typer.run(main)
