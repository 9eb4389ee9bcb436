"""A COPY whose connection is lost while the socket's buffer is full. asyncpg waits for space in the buffer, and neither
the loss of the connection nor the statement's timeout ends that wait. Formerly, a nightly run that restored rows hung
for ever and kept its lock; a writer of large batches would have hung too. A test that hung once in ten runs showed
this."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator

import pytest

from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import Kind, classify
from tests.conftest import SOON_S
from tests.proxy import Proxy

CHUNK = b"x" * 65_535 + b"\n"


class Source:
    """A source of more data than any socket buffers, with a count of the rows that were read."""

    def __init__(self) -> None:
        self.taken = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield chunks for copy_to_table."""
        for row in self.rows():
            yield row[0].encode() + b"\n"

    def rows(self) -> Iterator[tuple[str]]:
        """Yield rows for copy_records_to_table."""
        for _ in range(4_000):
            self.taken += 1
            yield ("x" * 65_535,)


def by_text(conn: Connection, source: Source) -> Awaitable[str]:
    """Copy text."""
    return conn.copy_to_table("heap", source=source.chunks(), format="text")


def by_records(conn: Connection, source: Source) -> Awaitable[str]:
    """Copy records."""
    return conn.copy_records_to_table("heap", records=source.rows())


@pytest.mark.parametrize("copy", [by_text, by_records])
async def test_a_copy_ends_with_its_connection(proxy: Proxy, copy: object) -> None:
    assert callable(copy)
    conn = await Database(proxy.dsn).connect(application="test")
    await conn.execute("CREATE TEMPORARY TABLE heap (text text)")
    source = Source()
    with proxy.stalled():
        copying = asyncio.ensure_future(copy(conn, source))
        taken = -1
        while taken != source.taken:  # until the buffer is full
            taken = source.taken
            await asyncio.sleep(0.2)
        assert not copying.done()
        proxy.cut()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Exception, match=r".") as failed:
                await copying
    assert classify(failed.value) is Kind.LOST
