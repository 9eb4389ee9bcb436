"""Structured logs: one JSON object per line on stderr, with `ts` in RFC 3339, `level`, `event` and fields.

A line that cannot be written (a full disk, a closed pipe, a pipe that nobody reads) is lost and counted; the caller
continues.
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

WAIT_MS = 50  # how long a line waits for a slow reader; then no line waits until the reader reads again
_PIECE = select.PIPE_BUF  # a pipe that poll() reports as writable accepts this many bytes at once

_lost = 0


def lines_lost() -> int:
    """Return the number of lines that this process could not write."""
    return _lost


class _Lines(Protocol):
    def write(self, line: str) -> None:
        """Write the line, or count it as lost. Never raises, and waits for 50 ms at most."""


class _Stderr:
    """The process's own stderr, by its descriptor. Other processes may share the open file, so this class does not make
    it non-blocking, but polls before each write."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lock = threading.Lock()
        self._stalled = False  # the reader did not read in time
        self._torn = False  # the last line was written in part
        self._reported = _lost  # the number of lost lines that the log mentions

    def write(self, line: str) -> None:
        global _lost  # noqa: PLW0603 - a count of the process, read by the daemon
        with self._lock:
            try:
                if _lost > self._reported:
                    self._write(_notice(_lost - self._reported))
                    self._reported = _lost
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
    """Any other stream, for example in tests."""

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
    """The logger to which structlog passes each rendered line."""

    def __init__(self, lines: _Lines) -> None:
        self.msg = lines.write

    def __getattr__(self, _level: str) -> Any:
        return self.msg


def _dumps(event: object, default: object = None) -> str:
    try:
        return orjson.dumps(event, default=str).decode()
    except (TypeError, ValueError):  # a lone surrogate, a number beyond 64 bits
        return json.dumps(event, default=str, skipkeys=True)


def _lines(stream: TextIO | None) -> _Lines:
    stream = stream or sys.stderr
    with suppress(AttributeError, OSError, ValueError):
        if stream.fileno() == 2:
            return _Stderr(2)
    return _Stream(stream)


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Send every log line, including those of libraries, as JSON to `stream` (default: stderr)."""
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


def capture_python_output() -> None:
    """Log warnings, and uncaught exceptions of threads and destructors. Python itself would write these to stderr, and
    might block forever there."""
    logging.captureWarnings(True)
    logger = get("python")
    sys.unraisablehook = lambda args: logger.error("unraisable", error=repr(args.exc_value), where=repr(args.object))
    threading.excepthook = lambda args: logger.error("thread.failed", error=repr(args.exc_value))


def print_text(text: str) -> None:
    """Write text for a person to stderr. If stderr cannot be written, the text is lost, as a log line would be."""
    _lines(None).write(text)


class _ToStructlog(logging.Handler):
    """Forward the log records of aiohttp, asyncio and asyncpg to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("aiohttp"):
            # The request is not valid HTTP. The exception quotes the line at fault, which may contain a key. Any client
            # can cause this, so the log gets one short line.
            kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
            get(record.name).warning("http.bad_request_line", error=kind)
            return
        level = record.levelname.lower()
        method = getattr(get(record.name), level if level in {"warning", "error", "critical"} else "info")
        method("library.log", message=record.getMessage(), exc_info=record.exc_info or None)


def get(room: str) -> Logger:
    """Return the logger of one module; each of its lines has the module's name in the field `room`."""
    logger: Logger = structlog.get_logger(room=room)
    return logger
