"""database.url: its parts, and what is wrong with one, each cause in a sentence of its own.

No sentence repeats a part of the url that may be the password; a host is shown only where it cannot be one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

FORM = "postgresql://user:password@host:port/database"
TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SESSIONS = ("any", "primary", "read-write")  # of target_session_attrs: those that can commit
TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
PORT = 5432
# Keys that take one of a few values, and what to say before those.
CHOICES = {
    "sslmode": (TLS_MODES, "it takes"),
    "target_session_attrs": (SESSIONS, "nexhb commits, and takes"),
    "sslnegotiation": (("postgres", "direct"), "it takes"),
    "ssl_min_protocol_version": (TLS_VERSIONS, "it takes"),
    "ssl_max_protocol_version": (TLS_VERSIONS, "it takes"),
    "gsslib": (("gssapi", "sspi"), "it takes"),
}
TAKEN = frozenset(
    ("host", "port", "user", "password", "passfile", "dbname", "database", "sslmode", "sslcert", "sslkey",
     "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation", "ssl_min_protocol_version",
     "ssl_max_protocol_version", "target_session_attrs", "krbsrvname", "gsslib", "options")
)  # fmt: skip
# Keys of libpq and of other drivers. asyncpg would send them to PostgreSQL as settings, which it does not know either.
_NOT_TAKEN = {
    "application_name": "nexhb names its sessions itself",
    "channel_binding": "nexhb cannot enforce it; sslmode=verify-full proves who the server is",
    "client_encoding": "nexhb speaks UTF-8",
    "connect_timeout": "nexhb gives each attempt 10 seconds",
    "fallback_application_name": "nexhb names its sessions itself",
    "hostaddr": "write the address as the host",
    "pgbouncer": "nexhb connects directly, without a pooler",
    "replication": "nexhb needs an ordinary session",
    "search_path": "nexhb sets its sessions' settings itself",
    "service": "write its host, port, user and database into the url",
    "ssl": "write sslmode=require",
    "sslcrldir": "name one file with sslcrl",
}
_ESCAPES = "write / as %2F, @ as %40, ? as %3F, # as %23, [ as %5B, ] as %5D"
_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[\da-fA-F:.]+\])(:\d+)?(?=[/?#]|$)")
_HOST = re.compile(
    r"(?P<path>/[^:\0]*)(?::(?P<p1>\d*))?|\[(?P<ip>[^\]]*)\](?::(?P<p2>\d*))?|(?P<name>[\w.-]+)(?::(?P<p3>.*))?"
)
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


@dataclass(frozen=True)
class Address:
    """The parts of a url; what it leaves out is empty."""

    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str = field(repr=False)
    database: str
    query: Mapping[str, str] = field(repr=False)

    @property
    def is_local(self) -> bool:
        """Whether every host is the folder of a socket: TLS is not spoken there, whatever sslmode says."""
        return bool(self.hosts) and all(host.startswith("/") for host, _ in self.hosts)

    @property
    def where(self) -> str:
        """Host and port of each server, for messages."""
        shown = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return ",".join(shown) or os.environ.get("PGHOST") or "PostgreSQL's socket on this host"


def parse(url: str) -> Address:
    """The parts of a url. Raises ValueError with a sentence that says what is wrong with it."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in ("postgresql", "postgres"):
        odd = f", not {scheme}://" if found and re.fullmatch(r"[a-z][a-z+]*", scheme) else ""
        raise ValueError(f"takes {FORM}{odd}")
    at = _beside(rest)
    if any(character.isspace() or ord(character) < 32 for character in url):
        raise ValueError(f"{at}contains a blank or a line end; in a password a blank is %20")
    split = min((rest.index(mark) for mark in "/?#" if mark in rest), default=len(rest))
    authority, beyond = rest[:split], rest[split:]
    _refuse_raw(authority, beyond, at)
    path, _, query = beyond.partition("?")
    login, _, servers = authority.rpartition("@")
    user, _, password = login.partition(":")
    try:
        keys = dict(_pairs(query, at))
        address = Address(
            tuple(_hosts(keys.get("host", ""), servers, keys.get("port", ""))),
            unquote(user, errors="strict") or keys.get("user", ""),
            unquote(password, errors="strict") or keys.get("password", ""),
            unquote(path.removeprefix("/"), errors="strict") or keys.get("dbname", "") or keys.get("database", ""),
            keys,
        )
    except UnicodeDecodeError:
        raise ValueError(f"{at}contains a percent-encoded byte that is not UTF-8") from None
    _refuse_keys(address)
    return address


def _beside(rest: str) -> str:
    """`host:port: ` of a url that may not be well-formed; empty where that may be a part of its password."""
    before, found, after = rest.rpartition("@")
    shown = _HOST_AND_PORT.match(after if found else rest)
    if not shown or (found and "=" in before.partition("?")[2]):
        return ""
    # Without an @ it may be user:password, and the host beyond a raw character.
    if not found and _cut_off(rest):
        return ""
    return f"{shown[0]}: " if shown[1] else f"{shown[0]}:{PORT}: "


def _cut_off(rest: str) -> bool:
    return "#" in rest or "?" in rest.partition("/")[0]


def _refuse_raw(authority: str, beyond: str, at: str) -> None:
    """Characters that end a password where they stand as they are: its rest would count as host or database."""
    login, found, servers = authority.rpartition("@")
    raw = ""
    if "@" in login:
        raw = "@"
    elif "[" in login or "]" in login:
        raw = "[ or ]"
    elif "@" in beyond:
        raw = "@" if found or "=" in beyond[: beyond.index("@")] else beyond[0]
    elif "#" in beyond:
        raw = "#"
    if raw:
        raise ValueError(f"{at}contains a raw {raw} in the user, the password or another value; {_ESCAPES}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", authority + beyond):
        raise ValueError(f"{at}contains a raw %; write it as %25")
    if _VARIABLE.search(servers) or any(_VARIABLE.fullmatch(part) for part in login.split(":", 1)):
        raise ValueError(f"{at}contains a variable such as $NAME, which is not expanded; a $ in a password is %24")


def _pairs(query: str, at: str) -> Iterator[tuple[str, str]]:
    for pair in query.split("&") if query else ():
        key, found, value = pair.partition("=")
        if not found or not re.fullmatch(r"\w+", key):
            raise ValueError(f"{at}takes KEY=VALUE after its ?; in a password ? is %3F")
        yield key, unquote(value, errors="strict")


def _hosts(named: str, servers: str, ports: str) -> Iterator[tuple[str, int]]:
    """Hosts and ports as libpq takes them: the key `host` counts before what stands before the path."""
    names = (
        named.split(",") if named else [unquote(one, errors="strict") for one in servers.split(",")] if servers else []
    )
    given = ports.split(",") if ports else [""]
    if names and len(given) not in (1, len(names)):
        raise ValueError(f"names {len(names)} hosts and {len(given)} ports")
    for number, name in enumerate(names):
        found = _HOST.fullmatch(name)
        host = found and (found["path"] or found["ip"] or found["name"])
        if not found or not host or (found["ip"] and not _is_address(host)):
            raise ValueError(f"takes a host name or an address as its host, an IPv6 address in [ ]: {FORM}")
        port = given[number % len(given)] or found["p1"] or found["p2"] or found["p3"] or str(PORT)
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{host}: takes a port from 1 to 65535")
        yield host, int(port)


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.IPv6Address(host))
    return False


def _refuse_keys(address: Address) -> None:
    at = f"{address.where}: "
    for key in address.query:
        if key in _NOT_TAKEN:
            raise ValueError(f"{at}takes no {key}: {_NOT_TAKEN[key]}")
        if key not in TAKEN:
            raise ValueError(f"{at}takes no {key}; it takes {', '.join(sorted(TAKEN))}")
    for key in CHOICES:
        if said := wrong_choice(key, address.query.get(key)):
            raise ValueError(f"{at}{said}")


def wrong_choice(key: str, value: str | None, named: str = "") -> str:
    """What is wrong with the value of a key, or of the variable `named` in its place; empty where nothing is."""
    allowed, why = CHOICES[key]
    if value is None or value in allowed:
        return ""
    shown = f" {value}" if re.fullmatch(r"[\w.-]+", value) else " of that name"
    return f"knows no {named or key}{shown}; {why} {', '.join(allowed)}"
