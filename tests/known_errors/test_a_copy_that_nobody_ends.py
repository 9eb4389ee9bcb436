"""Found by a test that hung once in ten: a COPY whose connection is lost while its data finds no room in the socket.

asyncpg waits for that room, and the loss of the connection does not end the wait; nor does the statement's timeout. A
nightly run that brought rows back stood still for ever, with its lock; a writer of large batches would have.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator

import pytest

from nexhb.db import Connection, Database
from nexhb.pgerrors import Kind, classify
from tests.conftest import SOON_S
from tests.proxy import Proxy

CHUNK = b"x" * 65_535 + b"\n"


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[Proxy]:
    """A proxy before the test's database."""
    async with Proxy(database.dsn).serving() as proxy:
        yield proxy


class Source:
    """More than any socket takes, and how much of it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """As copy_to_table takes them."""
        for row in self.rows():
            yield row[0].encode() + b"\n"

    def rows(self) -> Iterator[tuple[str]]:
        """As copy_records_to_table takes them."""
        for _ in range(4_000):
            self.taken += 1
            yield ("x" * 65_535,)


def by_text(conn: Connection, source: Source) -> Awaitable[str]:
    """A copy of text."""
    return conn.copy_to_table("heap", source=source.chunks(), format="text")


def by_records(conn: Connection, source: Source) -> Awaitable[str]:
    """A copy of records."""
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
        while taken != source.taken:  # until no room is left
            taken = source.taken
            await asyncio.sleep(0.2)
        assert not copying.done()
        proxy.cut()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Exception, match=r".") as failed:
                await copying
    assert classify(failed.value) is Kind.LOST
