"""A PostgreSQL of one's own with the real schema in it, and without a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg

from bench import stack
from nexhb import embedded, migrate


@asynccontextmanager
async def database() -> AsyncIterator[asyncpg.Connection]:
    """A connection to a migrated, empty database, gone at the end. Commits wait for the disk as the daemon's do."""
    with stack.run_folder() as folder:
        server = await asyncio.to_thread(embedded.start, folder / "data")
        try:
            settings = {"timezone": "UTC", "synchronous_commit": "on"}
            conn = await asyncpg.connect(server.dsn, timeout=10, command_timeout=600, server_settings=settings)
            try:
                await migrate.migrate(conn, datetime.now(UTC))
                yield conn
            finally:
                await conn.close(timeout=5)
        finally:
            await asyncio.to_thread(server.stop)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a comment beside DDL: the first to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join((first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))))

    return "\n".join(line(row).rstrip() for row in (head, ["-" * width for width in widths], *rows))
