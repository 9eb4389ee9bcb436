"""Who asks for the lists: a process of its own, as an operator's is. In the generator's an answer would lie there until
the generator is done with a heartbeat, and that would count as the daemon's time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from typing import Final, NamedTuple

import orjson
import uvloop

from bench import stack
from bench.report import Percentiles, percentiles
from bench.status.found import PATHS, List
from nexhb import sql
from nexhb.http.fleet import LIST_MOST

SETTLE_S: Final = 1.0  # before the first question
_ANSWER_S: Final = 30.0
_READS: Final = sql.queries("reads")
_SILENT_FOR: Final = timedelta(minutes=10)  # heartbeat.offline_after_seconds


class Questions(NamedTuple):
    """Where, and how many of each, one every so often."""

    port: int
    admin_key: str
    dsn: str
    requests: int
    every_s: float


class Answers(NamedTuple):
    """The lists; the yardstick, which is the first list's rows by asyncpg alone."""

    lists: tuple[List, ...]
    alone: Percentiles


@contextmanager
def asker() -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """A process for `ask`, which has started and imported what it needs, and its id."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process, process.submit(_own_pid).result()


def _own_pid() -> int:
    """Of this module, so that whoever is asked for it has imported it."""
    return os.getpid()


def ask(questions: Questions) -> Answers:
    """All of them, in turn."""
    return uvloop.run(_ask(questions))


async def _ask(questions: Questions) -> Answers:
    """On one connection each."""
    await asyncio.sleep(SETTLE_S)
    # room for a whole answer: with asyncio's 64 kB the reader stops the line five times an answer
    reader, writer = await asyncio.open_connection("127.0.0.1", questions.port, limit=2**22)
    conn = await stack.connect(questions.dsn)
    took: dict[str, list[float]] = {path: [] for path in PATHS}
    bodies: dict[str, bytes] = {}
    alone: list[float] = []
    began = time.monotonic()
    try:
        for number in range(questions.requests):
            for at, path in enumerate((*PATHS, None)):
                due = began + (number + at / (len(PATHS) + 1)) * questions.every_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                asked = time.perf_counter()
                if path is None:
                    await conn.fetch(_READS["offline_all"], datetime.now(UTC) - _SILENT_FOR, "{}", LIST_MOST)
                    alone.append(time.perf_counter() - asked)
                    continue
                bodies[path] = await _got(reader, writer, questions.admin_key, path)
                took[path].append(time.perf_counter() - asked)
    finally:
        writer.close()
        await conn.close(timeout=5)
    lists = (
        List(path, orjson.loads(body)["count"], len(body), percentiles(took[path])) for path, body in bodies.items()
    )
    return Answers(tuple(lists), percentiles(alone))


async def _got(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, admin_key: str, path: str) -> bytes:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nx-admin: {admin_key}\r\n\r\n".encode())
    async with asyncio.timeout(_ANSWER_S):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
    if not head.startswith(b"HTTP/1.1 200"):
        raise stack.StackError(f"GET {path} was answered {head[:100]!r} {body[:500]!r}")
    return body


def _length(head: bytes) -> int:
    """The Content-Length of an answer."""
    lines = head.lower().split(b"\r\n")
    return next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
