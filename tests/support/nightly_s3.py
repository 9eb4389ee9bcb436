"""Run the nightly job with an archive in an S3 bucket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from nexhb.archive.opening import open_store
from nexhb.archive.store import Store
from nexhb.config import ArchiveSettings
from nexhb.jobs import nightly, runner
from nexhb.jobs.nightly import NightlyContext
from nexhb.jobs.runner import JobRun
from nexhb.postgres.connections import Connection, Database
from tests.support.nightly import NOW, House
from tests.swift import S3Server

MakeBucket = Callable[[S3Server], Awaitable[ArchiveSettings]]


class Bucket(House):
    """A House whose archive is in an S3 bucket."""

    def __init__(self, database: Database, conn: Connection, folder: Path, archive: ArchiveSettings) -> None:
        super().__init__(database, conn, folder)
        self.archive = archive

    def context(self) -> NightlyContext:
        """Return the context that the daemon would create."""
        return replace(super().context(), store=lambda: open_store(str(self.archive.url), self.archive))

    async def nightly_s3(self) -> JobRun:
        """Run the nightly job."""
        return await runner.run(self.database, nightly.nightly_job(self.context()), NOW)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Store]:
        """Open the bucket as a store."""
        async with open_store(str(self.archive.url), self.archive) as store:
            yield store
