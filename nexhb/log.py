"""Structured logs: one JSON object a line on stderr, `ts` in RFC 3339, `level`, `event`, fields."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import orjson
import structlog

Logger = structlog.typing.FilteringBoundLogger


def _dumps(event: object, default: object = None) -> str:
    return orjson.dumps(event, default=str).decode()


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Send every log line, the libraries' too, as JSON to `stream` (stderr unless told otherwise)."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_ToStructlog()]
    root.setLevel(logging.WARNING)


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
