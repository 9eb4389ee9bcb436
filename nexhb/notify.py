"""Notify the service manager (sd_notify) by datagrams to $NOTIFY_SOCKET. Without that socket, nothing is sent."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nexhb import log
from nexhb.errors import described

_log = log.get("notify")

SEND_S = 1.0  # how long to wait for a full socket; a healthy service manager empties it at once


@dataclass(frozen=True)
class Notifier:
    """The address of the service manager, and its watchdog's period."""

    address: str = ""  # a path, or @name in the abstract namespace; empty if there is no service manager
    watchdog_s: float | None = None  # the service manager restarts the daemon after this time without WATCHDOG=1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        """Return the notifier that $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID describe."""
        address = environment.get("NOTIFY_SOCKET", "")
        if address[:1] not in ("/", "@"):
            return cls()
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        has_watchdog = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if has_watchdog else None)

    def send(self, **fields: object) -> bool:
        """Send one message, such as `READY=1`. Return False if there is no service manager or the message could not be
        sent; that is logged, and never stops the daemon."""
        if not self.address:
            return False
        # Each field takes one line: a reason with a line break must not become a field of its own.
        text = "".join(f"{name}={' '.join(str(value).split())}\n" for name, value in fields.items())
        address = f"\0{self.address[1:]}" if self.address[0] == "@" else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_S)
                sender.sendto(text.encode(), address)
        except OSError as error:
            _log.warning("notify.not_sent", fields=list(fields), error=described(error))
            return False
        return True

    def reloading(self) -> bool:
        """Report that the configuration is being read again; READY=1 ends that state."""
        return self.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def extend_timeout(self, seconds: float) -> bool:
        """Extend the timeout of a slow start or stop by this time from now."""
        return self.send(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))
