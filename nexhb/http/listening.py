"""Why the daemon cannot listen, said by its cause."""

from __future__ import annotations

import errno
import socket

from nexhb.errors import CannotListen, ConfigError, NexhbError


def refusal(error: OSError, host: str, key: str, port: int) -> NexhbError:
    """The error for server.host and the port of the key `key`. A port that is taken may be free in a moment, and an
    address or a name may come with the network: only what no time mends is a ConfigError."""
    at = f"server.host {host}, server.{key} {port}"
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{at}: this user may not listen on a port below 1024.",
            hint=f"Set server.{key} to 1024 or more, or grant CAP_NET_BIND_SERVICE (docs/install.md).",
        )
    if error.errno == errno.EADDRINUSE:
        return CannotListen(
            f"{at}: another process listens there.",
            hint=f"Is another nexhb running? `ss -ltnp` names the process; or set server.{key}.",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return CannotListen(
            f"{at}: this is not an address of this machine.",
            hint="`ip address` lists them; server.host 0.0.0.0 listens on all of them.",
        )
    if isinstance(error, socket.gaierror):
        return CannotListen(
            f"{at}: the name is not known: {error.strerror}.",
            hint="server.host takes a name or an address of this machine.",
        )
    return CannotListen(f"{at}: {error.strerror or error}.")
