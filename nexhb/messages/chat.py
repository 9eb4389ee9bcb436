"""Send messages by Apprise, which knows chat services, pagers and mail: the extra nexhb[notify]."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections import defaultdict
from typing import Any

from nexhb.errors import ConfigError, DeliveryFailed, described
from nexhb.messages.message import Message
from nexhb.threads import in_daemon_thread

MAX_THREADS = 4  # of one route: a service that hangs occupies no thread of another route
MAX_REASON = 300

_TYPES = {"info": "info", "warning": "warning", "critical": "failure"}


def check(url: str, key: str) -> None:
    """Raise ConfigError that names the key unless Apprise is installed and knows this URL."""
    is_https = url.lower().startswith("https://")
    if importlib.util.find_spec("apprise") is None:
        name = "secret: is required for a webhook; any other service" if is_https else "url: this service"
        raise ConfigError(f"{key}.{name} needs Apprise.", hint="Install it: pip install 'nexhb[notify]'.")
    if _service(url) is None:
        if is_https:
            hint = "`openssl rand -base64 32` prints one."
            raise ConfigError(f"{key}.secret: is required for a webhook.", hint=hint)
        raise ConfigError(f"{key}.url: Apprise knows no such service, or the URL is not complete.")


def _service(url: str) -> Any:
    apprise = importlib.import_module("apprise")  # 0.4 s, only with such a route
    asset = apprise.AppriseAsset(app_id="nexhb", app_desc="nexhb", app_url="", async_mode=False)
    return apprise.Apprise.instantiate(url, asset=asset, suppress_exceptions=True)


class Chats:
    """Sends messages in threads, of which each route has a limited number. A thread whose service hangs is abandoned:
    it counts until it ends."""

    def __init__(self) -> None:
        self._busy: dict[str, set[object]] = defaultdict(set)

    async def send(self, route: str, url: str, message: Message) -> None:
        """Send a message. Raise DeliveryFailed."""
        busy, token = self._busy[route], object()
        if len(busy) >= MAX_THREADS:
            raise DeliveryFailed("Earlier messages to this service still wait for its response.")
        busy.add(token)

        def work() -> None:
            try:
                _notify(url, message)
            finally:
                busy.discard(token)

        try:
            await in_daemon_thread(work)
        except RuntimeError as error:  # no thread can be started
            busy.discard(token)
            raise DeliveryFailed(f"{described(error)}.") from None


def _notify(url: str, message: Message) -> None:
    severity = str(message.data.get("severity"))
    try:
        with _Warnings() as warnings:
            service = _service(url)
            is_sent = service is not None and service.notify(
                title=message.title(), body=message.text(), body_format="text",
                notify_type=_TYPES.get(severity, "info"),
            )  # fmt: skip
    except Exception as error:  # of a plugin; its message may repeat the URL, which contains secrets
        raise DeliveryFailed(f"Apprise failed: {type(error).__name__}.") from None
    if not is_sent:
        raise DeliveryFailed(warnings.text or "The service did not accept the message.")


class _Warnings(logging.Handler):
    """Collects what Apprise logs in this thread: that is where it says why a message was not accepted."""

    def __enter__(self) -> _Warnings:
        self._thread = threading.get_ident()
        self.text = ""
        logger = logging.getLogger("apprise")
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("apprise").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and threading.get_ident() == self._thread:
            self.text = f"{self.text} {record.getMessage()}".strip()[:MAX_REASON]
