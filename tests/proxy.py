"""A TCP proxy with faults, for PostgreSQL's socket or any other server."""

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
_WRITER = "nexhb writer"  # faults of COMMIT apply to these sessions
_COMMIT = re.compile(rb"COMMIT(?: AND CHAIN)?[;\0]")  # how asyncpg and the writer end transactions
_APPLICATION = re.compile(rb"\0application_name\0([^\0]*)\0")


class Direction(enum.Enum):
    """The direction of a message."""

    TO_SERVER = "to the server"
    TO_CLIENT = "to the client"


class CommitFault(enum.Enum):
    """A fault of the writer's next COMMIT. The COMMITs of other sessions pass."""

    NONE = "none"
    LOSE_RESPONSE = "lose the response"  # the COMMIT is executed, but the connection is closed before its response
    CUT_BEFORE = "cut before"  # the connection is closed before the COMMIT reaches PostgreSQL
    HANG = "hang"  # for a minute, the COMMIT does not reach PostgreSQL, and the connection stays open


class Connection(NamedTuple):
    """One connection through a relay."""

    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    loses_responses: asyncio.Event  # if set: instead of forwarding a response, close the connection
    passing: asyncio.Event  # if cleared: forward nothing


class Relay:
    """A relay between clients and a server; `_open` connects to the server."""

    def __init__(self) -> None:
        self.port = 0
        self.refusing = False
        self.delay_s = 0.0  # delay of each chunk, in either direction
        # In these directions, forward half of the next message, then close the connection.
        self.truncated: set[Direction] = set()
        self.fault_applied = asyncio.Event()  # set when `truncated`, or a CommitFault, has been applied to a message
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[Connection] = set()
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
        """Close every connection."""
        for connection in list(self._connections):
            _abort(connection)

    def reset(self) -> None:
        """Reset every connection, which discards data in transit."""
        for connection in list(self._connections):
            for end in connection.ends:
                with suppress(OSError):
                    if (raw := end.get_extra_info("socket")) is not None:  # None if the socket is closed already
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            _abort(connection)

    def lose_responses(self) -> None:
        """Let each open connection still forward requests, but close it instead of forwarding a response."""
        for connection in self._connections:
            connection.loses_responses.set()

    def make_unreachable(self) -> None:
        """Simulate a server that is down: close connections, and refuse new ones."""
        self.refusing = True
        self.cut()

    def make_reachable(self) -> None:
        """Simulate that the server is up again."""
        self.refusing = False

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """For the block, forward nothing, and keep the connections open."""
        self._passing.clear()
        try:
            yield
        finally:
            self._passing.set()

    def end_faults(self) -> None:
        """End all faults for data sent from now on."""
        self.refusing, self.delay_s = False, 0.0
        self.truncated.clear()
        self._passing.set()

    async def _open(self) -> Streams:
        """Connect to the server."""
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
        connection = Connection((writer, to_writer), asyncio.Event(), asyncio.Event())
        connection.passing.set()
        self._connections.add(connection)
        pair = [
            asyncio.create_task(self._forward(reader, to_writer, connection, Direction.TO_SERVER)),
            asyncio.create_task(self._forward(to_reader, writer, connection, Direction.TO_CLIENT)),
        ]
        self._tasks.update(pair)
        try:
            await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(connection)
            _abort(connection)
            for task in pair:
                task.cancel()
                self._tasks.discard(task)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection, direction: Direction
    ) -> None:
        """Forward data until either side closes, or a fault closes the connection."""
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                await self._passing.wait()
                await connection.passing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if not await self._may_forward(data, connection, direction):
                    return
                if direction in self.truncated:
                    self.truncated.discard(direction)
                    writer.write(data[: max(1, len(data) // 2)])
                    await writer.drain()
                    self.fault_applied.set()
                    return
                writer.write(data)

    async def _may_forward(self, _data: bytes, connection: Connection, direction: Direction) -> bool:
        """Return whether to forward the chunk. If not, the connection is closed."""
        return direction is Direction.TO_SERVER or not connection.loses_responses.is_set()


class Proxy(Relay):
    """A relay between a daemon and PostgreSQL."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        url = urlsplit(dsn)
        self._user, self._database = url.username, url.path.lstrip("/")
        self.commit_fault = CommitFault.NONE
        self._applications: dict[Connection, str] = {}
        self.redirect_to(dsn)

    def redirect_to(self, dsn: str) -> None:
        """Direct new connections to the server at `dsn`, whose user and database have the same names as before."""
        self._socket = f"{parse_qs(urlsplit(dsn).query)['host'][0]}/.s.PGSQL.5432"

    @property
    def dsn(self) -> str:
        """Return the DSN that leads through the proxy."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}/{self._database}?sslmode=disable"

    def end_faults(self) -> None:
        """See Relay."""
        super().end_faults()
        self.commit_fault = CommitFault.NONE

    async def _open(self) -> Streams:
        return await asyncio.open_unix_connection(self._socket)

    @contextmanager
    def stalled_for(self, application: str) -> Iterator[int]:
        """For the block, forward nothing on this application's present connections; yield their number."""
        connections = [
            connection for connection in self._connections if self._applications.get(connection) == application
        ]
        for connection in connections:
            connection.passing.clear()
        try:
            yield len(connections)
        finally:
            for connection in connections:
                connection.passing.set()

    async def _may_forward(self, data: bytes, connection: Connection, direction: Direction) -> bool:
        if connection not in self._applications:  # its first message is the startup packet
            match = _APPLICATION.search(data)
            self._applications = {
                known: name for known, name in self._applications.items() if known in self._connections
            }
            self._applications[connection] = match[1].decode() if match else ""
        commits = (
            direction is Direction.TO_SERVER and self._applications[connection] == _WRITER and _COMMIT.search(data)
        )
        if commits and self.commit_fault is not CommitFault.NONE:
            fault, self.commit_fault = self.commit_fault, CommitFault.NONE
            self.fault_applied.set()
            if fault is CommitFault.CUT_BEFORE:
                return False
            if fault is CommitFault.HANG:
                await asyncio.sleep(60)
            connection.loses_responses.set()
        return await super()._may_forward(data, connection, direction)


def _abort(connection: Connection) -> None:
    for end in connection.ends:
        end.transport.abort()
