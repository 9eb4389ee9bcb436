"""Structured logs: one JSON object a line on stderr, `ts` in RFC 3339, `level`, `event`, fields.

A line that cannot be written (a full disk, a pipe that nobody reads or that is closed) is lost and counted, and whoever
logs goes on.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from contextlib import suppress
from typing import Any, Protocol, TextIO

import orjson
import structlog

Logger = structlog.typing.FilteringBoundLogger

WAIT_MS = 50  # for a reader that is slow; once one has been waited for in vain, nobody waits until he reads again
_PIECE = select.PIPE_BUF  # a pipe that is called writable takes as much at once

_lost = 0


def lines_lost() -> int:
    """Lines that could not be written since this process began."""
    return _lost


class _Lines(Protocol):
    def write(self, line: str) -> None:
        """Write it, or count it as lost. Never raises, and never waits for long."""


class _Stderr:
    """The process's own stderr, by its descriptor. Its open file may be another process's too, so it stays as it is,
    and is asked before each write whether that would block."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lock = threading.Lock()
        self._stalled = False  # nobody reads
        self._torn = False  # half a line stands there
        self._told = _lost  # of the lines lost

    def write(self, line: str) -> None:
        global _lost  # noqa: PLW0603 - a count of the process, read by the daemon
        with self._lock:
            try:
                if _lost > self._told:
                    self._write(_notice(_lost - self._told))
                    self._told = _lost
                self._write(line)
            except (OSError, ValueError, MemoryError):
                _lost += 1

    def _write(self, line: str) -> None:
        data = b"\n" * self._torn + line.encode("utf-8", "backslashreplace") + b"\n"
        written = 0
        try:
            while written < len(data):
                self._await_room()
                written += os.write(self._descriptor, data[written : written + _PIECE])
        finally:
            if written:
                self._torn = written < len(data)

    def _await_room(self) -> None:
        ready = self._poll.poll(0 if self._stalled else WAIT_MS)
        self._stalled = not ready
        if self._stalled:
            raise BlockingIOError


class _Stream:
    """Any other stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        global _lost  # noqa: PLW0603 - see above
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError, MemoryError):
            _lost += 1


def _notice(lost: int) -> str:
    ts = structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts")
    return _dumps(ts(None, "warning", {"room": "log", "lost": lost, "event": "log.lines_lost", "level": "warning"}))


class _Printer:
    """What structlog hands finished lines to."""

    def __init__(self, lines: _Lines) -> None:
        self.msg = lines.write

    def __getattr__(self, _level: str) -> Any:
        return self.msg


def _dumps(event: object, default: object = None) -> str:
    try:
        return orjson.dumps(event, default=str).decode()
    except (TypeError, ValueError):  # half a character, a number past 64 bits
        return json.dumps(event, default=str, skipkeys=True)


def _lines(stream: TextIO | None) -> _Lines:
    stream = stream or sys.stderr
    with suppress(AttributeError, OSError, ValueError):
        if stream.fileno() == 2:
            return _Stderr(2)
    return _Stream(stream)


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Send every log line, the libraries' too, as JSON to `stream` (stderr unless told otherwise)."""
    printer = _Printer(_lines(stream))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: printer,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_ToStructlog()]
    root.setLevel(logging.WARNING)


def take_over() -> None:
    """Log what Python itself would write to stderr, where it might wait for a reader for ever: warnings, and exceptions
    that nobody caught in a thread or a destructor."""
    logging.captureWarnings(True)
    room = get("python")
    sys.unraisablehook = lambda found: room.error("unraisable", error=repr(found.exc_value), where=repr(found.object))
    threading.excepthook = lambda found: room.error("thread.failed", error=repr(found.exc_value))


def say(text: str) -> None:
    """Text for a person, on stderr; lost where a log line would be."""
    _lines(None).write(text)


class _ToStructlog(logging.Handler):
    """What aiohttp, asyncio and asyncpg log arrives in the same form as our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("aiohttp"):
            # A request that is no HTTP: its exception repeats the line at fault, and that line may be a key's. Whoever
            # knocks on the port can send such, so it is one short line.
            kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
            get(record.name).warning("http.bad_request_line", error=kind)
            return
        level = record.levelname.lower()
        method = getattr(get(record.name), level if level in {"warning", "error", "critical"} else "info")
        method("library.log", message=record.getMessage(), exc_info=record.exc_info or None)


def get(room: str) -> Logger:
    """The logger of one room; the room's name stands in each of its lines."""
    logger: Logger = structlog.get_logger(room=room)
    return logger
