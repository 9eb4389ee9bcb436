"""Explain why the daemon cannot listen."""

from __future__ import annotations

import errno
import socket

from nexhb.errors import CannotListen, ConfigError, NexhbError


def listen_error(error: OSError, host: str, key: str, port: int) -> NexhbError:
    """Return the error to raise for server.host and the port of the setting server.`key`. It is a ConfigError only if
    waiting cannot help: a port in use may become free, and an address or a name may appear with the network."""
    at = f"server.host {host}, server.{key} {port}"
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{at}: this user may not listen on a port below 1024.",
            hint=f"Set server.{key} to 1024 or more, or grant CAP_NET_BIND_SERVICE (docs/install.md).",
        )
    if error.errno == errno.EADDRINUSE:
        return CannotListen(
            f"{at}: the port is in use by another process.",
            hint=f"Run `ss -ltnp` to find the process (perhaps another nexhb), or set server.{key}.",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return CannotListen(
            f"{at}: this machine does not have this address.",
            hint="Run `ip address` to list its addresses; server.host 0.0.0.0 listens on all of them.",
        )
    if isinstance(error, socket.gaierror):
        return CannotListen(
            f"{at}: the name cannot be resolved: {error.strerror}.",
            hint="Set server.host to a name or an address of this machine.",
        )
    return CannotListen(f"{at}: {error.strerror or error}.")
