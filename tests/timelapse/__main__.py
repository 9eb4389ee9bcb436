"""`python -m tests.timelapse --days 200 --seed 1`, on a PostgreSQL of its own that goes with it."""

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

from nexhb import embedded, log, migrate
from nexhb.db import Database
from tests.timelapse.checks import Check
from tests.timelapse.days import live
from tests.timelapse.ledger import Broken
from tests.timelapse.report import progress, show
from tests.timelapse.world import Settings, World


def main(
    days: Annotated[int, typer.Option(min=20, help="Simulated days.")] = 200,
    seed: Annotated[int, typer.Option(help="Which faults, when; which heartbeats.")] = 1,
    retention: Annotated[int, typer.Option(min=8, help="Days that are kept.")] = 90,
    minutes: Annotated[float, typer.Option(help="It must not take longer.")] = 5,
    log_file: Annotated[Path | None, typer.Option("--log", help="Write nexhb's own log there.")] = None,
) -> None:
    """Live the days, print what was met and what holds. Exit code 1: something does not."""
    console = Console()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="nexhb-timelapse-"))
    folder.chmod(0o711)  # as root, PostgreSQL's own user must pass
    try:
        with (log_file or folder / "nexhb.log").open("w") as stream:
            log.setup("info", stream)
            settings = Settings(seed=seed, days=days, retention_days=retention)
            world, found = uvloop.run(_run(settings, folder, minutes, console))
    except Broken as error:
        console.print("Broken.", style="red")
        console.print(f"{error}", highlight=False, markup=False)
        again = f"python -m tests.timelapse --days {days} --seed {seed} --retention {retention} --log FILE"
        console.print(f"Again: {again}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    good = show(console, world, found, time.monotonic() - began)
    raise typer.Exit(0 if good else 1)


async def _run(settings: Settings, folder: Path, minutes: float, console: Console) -> tuple[World, list[Check]]:
    with embedded.start(folder / "data") as server:
        conn = await Database(server.dsn).connect(application="timelapse")
        await migrate.migrate(conn, datetime.now(UTC))
        await conn.close()
        try:
            async with asyncio.timeout(minutes * 60):
                return await live(settings, server.dsn, folder, lambda world: progress(console, world))
        except TimeoutError:
            raise Broken(f"It was not done within {minutes:g} minutes.") from None


if __name__ == "__main__":
    typer.run(main)
