"""A TCP proxy before PostgreSQL's socket that can be told to misbehave."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qs, urlsplit


class Trick(enum.Enum):
    """What happens to the next COMMIT."""

    NONE = "none"
    SWALLOW_ANSWER = "swallow the answer"  # it is committed, and nobody hears of it
    CUT_BEFORE = "cut before it"  # it never arrives
    HANG = "hang"  # it arrives nowhere, and the line stays open


class Proxy:
    """Between a daemon and PostgreSQL."""

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self._socket = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._user, self._database = parts.username, parts.path.lstrip("/")
        self.trick = Trick.NONE
        self.played = asyncio.Event()
        self.refusing = False
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def dsn(self) -> str:
        """The way through the proxy."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}/{self._database}?sslmode=disable"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Proxy]:
        """Listen for the block."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cut every line."""
        for writer in list(self._writers):
            writer.transport.abort()

    def take_away(self) -> None:
        """The database is gone: lines cut, new ones refused."""
        self.refusing = True
        self.cut()

    def give_back(self) -> None:
        """It is there again."""
        self.refusing = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        to_reader, to_writer = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, to_writer}
        swallow = asyncio.Event()
        pair = [
            asyncio.create_task(self._forward(reader, to_writer, swallow)),
            asyncio.create_task(self._back(to_reader, writer, swallow)),
        ]
        self._tasks.update(pair)
        try:
            await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (writer, to_writer):
                one.transport.abort()
                self._writers.discard(one)
            for task in pair:
                task.cancel()
                self._tasks.discard(task)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: asyncio.Event
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if b"COMMIT;" in data and self.trick is not Trick.NONE:
                    trick, self.trick = self.trick, Trick.NONE
                    self.played.set()
                    if trick is Trick.CUT_BEFORE:
                        return
                    if trick is Trick.HANG:
                        await asyncio.sleep(60)
                    swallow.set()
                writer.write(data)

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: asyncio.Event) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if swallow.is_set():
                    return
                writer.write(data)
