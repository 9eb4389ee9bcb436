"""What a service manager is told (sd_notify): datagrams to $NOTIFY_SOCKET. Without that socket nothing happens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nexhb import log

_log = log.get("notify")

SEND_S = 1.0  # how long a full socket is waited for; a service manager that is well empties it at once


@dataclass(frozen=True)
class Notifier:
    """Where to send, and how often it wants to be fed."""

    address: str = ""  # a path, or @name in the abstract namespace; empty: nobody listens
    watchdog_s: float | None = None  # the service manager acts when it has heard no WATCHDOG=1 for so long

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        """As $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID say."""
        address = environment.get("NOTIFY_SOCKET", "")
        if address[:1] not in ("/", "@"):
            return cls()
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        meant = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if meant else None)

    def send(self, **fields: object) -> bool:
        """One message, `READY="1"` and so on. False where nobody listens or it could not be sent: that is logged, and
        never stops the daemon."""
        if not self.address:
            return False
        # One field a line: a reason with a line break must not become a field of its own.
        text = "".join(f"{name}={' '.join(str(value).split())}\n" for name, value in fields.items())
        address = f"\0{self.address[1:]}" if self.address[0] == "@" else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.settimeout(SEND_S)
                line.sendto(text.encode(), address)
        except OSError as error:
            _log.warning("notify.not_sent", fields=list(fields), error=f"{type(error).__name__}: {error}")
            return False
        return True

    def reloading(self) -> bool:
        """The configuration is being read again; READY=1 ends that."""
        return self.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def ask_for_time(self, seconds: float) -> bool:
        """A start or a stop that is slow goes on: be patient for so much longer."""
        return self.send(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))
