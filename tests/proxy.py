"""A TCP proxy that can be told to misbehave: before PostgreSQL's socket, or before anything else that listens."""

from __future__ import annotations

import asyncio
import enum
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CHUNK = 65_536
_WRITER = "nexhb writer"  # the sessions whose COMMITs tricks are for
_COMMIT = re.compile(rb"COMMIT(?: AND CHAIN)?[;\0]")  # as asyncpg's transactions and the writer's end
_APPLICATION = re.compile(rb"\0application_name\0([^\0]*)\0")


class Way(enum.Enum):
    """Which way a message goes."""

    THERE = "there"
    BACK = "back"


class Trick(enum.Enum):
    """What happens to the writer's next COMMIT; other sessions commit at times of their own."""

    NONE = "none"
    SWALLOW_ANSWER = "swallow the answer"  # it is committed, and nobody hears of it
    CUT_BEFORE = "cut before it"  # it never arrives
    HANG = "hang"  # it arrives nowhere, and the line stays open


class Line(NamedTuple):
    """One connection through a relay."""

    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    deaf: asyncio.Event  # set: what comes back is thrown away, and the line cut
    passing: asyncio.Event


class Relay:
    """Between somebody who connects and somebody who listens; `_open` says who that is."""

    def __init__(self) -> None:
        self.port = 0
        self.refusing = False
        self.delay_s = 0.0  # for each piece, either way
        self.half: set[Way] = set()  # of the next message that way half arrives, and the line is cut
        self.played = asyncio.Event()
        self._passing = asyncio.Event()
        self._passing.set()
        self._lines: set[Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Self]:
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
        for line in list(self._lines):
            _abort(line)

    def reset(self) -> None:
        """Cut every line with a RST, which throws away what was on its way."""
        for line in list(self._lines):
            for end in line.ends:
                with suppress(OSError):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
            _abort(line)

    def deafen(self) -> None:
        """What is sent now arrives, and what is answered does not: each line is cut when an answer comes."""
        for line in self._lines:
            line.deaf.set()

    def take_away(self) -> None:
        """Who listens is gone: lines cut, new ones refused."""
        self.refusing = True
        self.cut()

    def give_back(self) -> None:
        """It is there again."""
        self.refusing = False

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """For the block nothing passes, and no line is cut."""
        self._passing.clear()
        try:
            yield
        finally:
            self._passing.set()

    def heal(self) -> None:
        """Nothing is wrong any more with what is sent from now on."""
        self.refusing, self.delay_s = False, 0.0
        self.half.clear()
        self._passing.set()

    async def _open(self) -> Streams:
        """A connection to who listens."""
        raise NotImplementedError

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await self._open()
        except OSError:
            writer.transport.abort()
            return
        line = Line((writer, to_writer), asyncio.Event(), asyncio.Event())
        line.passing.set()
        self._lines.add(line)
        pair = [
            asyncio.create_task(self._forward(reader, to_writer, line, Way.THERE)),
            asyncio.create_task(self._forward(to_reader, writer, line, Way.BACK)),
        ]
        self._tasks.update(pair)
        try:
            await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._lines.discard(line)
            _abort(line)
            for task in pair:
                task.cancel()
                self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line, way: Way) -> None:
        """Pass on until somebody closes, or until the line is to be cut."""
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                await self._passing.wait()
                await line.passing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if not await self._look(data, line, way):
                    return
                if way in self.half:
                    self.half.discard(way)
                    writer.write(data[: max(1, len(data) // 2)])
                    await writer.drain()
                    self.played.set()
                    return
                writer.write(data)

    async def _look(self, _data: bytes, line: Line, way: Way) -> bool:
        """Whether the piece may pass; else the line is cut."""
        return way is Way.THERE or not line.deaf.is_set()


class Proxy(Relay):
    """Between a daemon and PostgreSQL."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        parts = urlsplit(dsn)
        self._user, self._database = parts.username, parts.path.lstrip("/")
        self.trick = Trick.NONE
        self._applications: dict[Line, str] = {}
        self.lead_to(dsn)

    def lead_to(self, dsn: str) -> None:
        """New lines lead to this server: its user and database have the same names."""
        self._socket = f"{parse_qs(urlsplit(dsn).query)['host'][0]}/.s.PGSQL.5432"

    @property
    def dsn(self) -> str:
        """The way through the proxy."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}/{self._database}?sslmode=disable"

    def heal(self) -> None:
        """See Relay."""
        super().heal()
        self.trick = Trick.NONE

    async def _open(self) -> Streams:
        return await asyncio.open_unix_connection(self._socket)

    @contextmanager
    def frozen(self, application: str) -> Iterator[int]:
        """For the block nothing passes on the lines that this application has now; how many they are."""
        lines = [line for line in self._lines if self._applications.get(line) == application]
        for line in lines:
            line.passing.clear()
        try:
            yield len(lines)
        finally:
            for line in lines:
                line.passing.set()

    async def _look(self, data: bytes, line: Line, way: Way) -> bool:
        if line not in self._applications:  # its first message is the startup packet
            found = _APPLICATION.search(data)
            self._applications = {one: name for one, name in self._applications.items() if one in self._lines}
            self._applications[line] = found[1].decode() if found else ""
        commits = way is Way.THERE and self._applications[line] == _WRITER and _COMMIT.search(data)
        if commits and self.trick is not Trick.NONE:
            trick, self.trick = self.trick, Trick.NONE
            self.played.set()
            if trick is Trick.CUT_BEFORE:
                return False
            if trick is Trick.HANG:
                await asyncio.sleep(60)
            line.deaf.set()
        return await super()._look(data, line, way)


def _abort(line: Line) -> None:
    for end in line.ends:
        end.transport.abort()
