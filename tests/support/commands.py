"""Commands of nexhb beside a test's daemons."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nexhb.postgres.connections import Database
from tests.support import forks


async def nexhb(database: Database, tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command. Return its exit code, stdout and stderr."""
    env = {"DATABASE_URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "PATH": ""}
    done = await asyncio.to_thread(forks.run, "nexhb", arguments, env=env, timeout=50)
    return done.returncode, done.stdout, done.stderr
