"""Where load may go: plain http on this machine."""

from __future__ import annotations

import ipaddress
import resource
from dataclasses import dataclass
from urllib.parse import urlsplit

from bench.fleet import Device


class NotLoopbackError(ValueError):
    """The load generator only targets this machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the heartbeats go: a numeric loopback address."""

    host: str
    port: int
    path: str = "/v1/heartbeat"
    media: str = "application/json"

    def head(self, device: Device) -> bytes:
        """A request's head up to the number of `Content-Length`; not every agent names the charset."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        charset = "; charset=utf-8" if device.index % 3 and self.media == "application/json" else ""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Authorization: Bearer {device.token}\r\nContent-Type: {self.media}{charset}\r\n"
            "Connection: Keep-Alive\r\nUser-Agent: okhttp/4.12.0\r\nContent-Length: "
        ).encode()

    def greeting(self) -> bytes:
        """A request that any server answers, if only with a 404."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"GET /healthz HTTP/1.1\r\nHost: {host}:{self.port}\r\n\r\n".encode()


def target(url: str) -> Target:
    """Read a base URL; anything but plain http on a loopback address is refused."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// URL")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise NotLoopbackError(
            f"{parts.hostname} is not a loopback address: load goes to 127.0.0.0/8, ::1 or localhost only"
        )
    path = parts.path.rstrip("/").removesuffix("/v1/heartbeat")
    return Target(host, parts.port or 80, f"{path}/v1/heartbeat")


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, for this process; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_048_576 if hard == resource.RLIM_INFINITY else hard
