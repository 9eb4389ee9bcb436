"""Parse database.url, with a separate error message for each cause.

No message repeats a part of the URL that may be the password; a host is shown only if it cannot be the password.
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
SESSIONS = ("any", "primary", "read-write")  # values of target_session_attrs that allow a server able to commit
TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
PORT = 5432
# Keys with a fixed set of values, and the words that introduce the set in a message.
CHOICES = {
    "sslmode": (TLS_MODES, "allowed:"),
    "target_session_attrs": (SESSIONS, "nexhb writes, so allowed:"),
    "sslnegotiation": (("postgres", "direct"), "allowed:"),
    "ssl_min_protocol_version": (TLS_VERSIONS, "allowed:"),
    "ssl_max_protocol_version": (TLS_VERSIONS, "allowed:"),
    "gsslib": (("gssapi", "sspi"), "allowed:"),
}
SUPPORTED_KEYS = frozenset(
    ("host", "port", "user", "password", "passfile", "dbname", "database", "sslmode", "sslcert", "sslkey",
     "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation", "ssl_min_protocol_version",
     "ssl_max_protocol_version", "target_session_attrs", "krbsrvname", "gsslib", "options")
)  # fmt: skip
# Keys of libpq and other drivers. If nexhb accepted them, asyncpg would send them to PostgreSQL as settings, and
# PostgreSQL would reject them.
_UNSUPPORTED_KEYS = {
    "application_name": "nexhb sets it itself",
    "channel_binding": "nexhb cannot enforce it; sslmode=verify-full authenticates the server",
    "client_encoding": "nexhb always uses UTF-8",
    "connect_timeout": "nexhb uses a timeout of 10 seconds",
    "fallback_application_name": "nexhb sets it itself",
    "hostaddr": "write the address as the host",
    "pgbouncer": "nexhb connects directly, without a pooler",
    "replication": "nexhb needs an ordinary session",
    "search_path": "nexhb sets it itself",
    "service": "write its host, port, user and database into the URL",
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
    """The parts of a URL; an omitted part is empty."""

    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str = field(repr=False)
    database: str
    query: Mapping[str, str] = field(repr=False)

    @property
    def is_local(self) -> bool:
        """Return whether every host is a socket folder. A socket never uses TLS, whatever sslmode is."""
        return bool(self.hosts) and all(host.startswith("/") for host, _ in self.hosts)

    @property
    def where(self) -> str:
        """Return host and port of each server, for messages."""
        shown = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return ",".join(shown) or os.environ.get("PGHOST") or "PostgreSQL's socket on this host"


def parse(url: str) -> Address:
    """Return the parts of a URL. Raises ValueError with a message that names the fault."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):
        wrong_scheme = f", not {scheme}://" if separator and re.fullmatch(r"[a-z][a-z+]*", scheme) else ""
        raise ValueError(f"expected {FORM}{wrong_scheme}")
    at = _location(rest)
    if any(character.isspace() or ord(character) < 32 for character in url):
        raise ValueError(f"{at}contains a space or a line break; write a space in a password as %20")
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


def _location(rest: str) -> str:
    """Return `host:port: ` of a URL that may be malformed, or an empty text if the host may be a part of the
    password."""
    before, at_sign, after = rest.rpartition("@")
    shown = _HOST_AND_PORT.match(after if at_sign else rest)
    if not shown or (at_sign and "=" in before.partition("?")[2]):
        return ""
    # Without an @, the part before a raw # or ? may be user:password, and the host may follow.
    if not at_sign and _is_cut_off(rest):
        return ""
    return f"{shown[0]}: " if shown[1] else f"{shown[0]}:{PORT}: "


def _is_cut_off(rest: str) -> bool:
    """Return whether an unescaped # or ? ends the URL before its path."""
    return "#" in rest or "?" in rest.partition("/")[0]


def _refuse_raw(authority: str, beyond: str, at: str) -> None:
    """Reject unescaped characters that would end a password early: the rest of the password would be read as the host
    or the database."""
    login, at_sign, servers = authority.rpartition("@")
    raw = ""
    if "@" in login:
        raw = "@"
    elif "[" in login or "]" in login:
        raw = "[ or ]"
    elif "@" in beyond:
        raw = "@" if at_sign or "=" in beyond[: beyond.index("@")] else beyond[0]
    elif "#" in beyond:
        raw = "#"
    if raw:
        raise ValueError(f"{at}contains a raw {raw} in the user, the password or another value; {_ESCAPES}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", authority + beyond):
        raise ValueError(f"{at}contains a raw %; write % as %25")
    if _VARIABLE.search(servers) or any(_VARIABLE.fullmatch(part) for part in login.split(":", 1)):
        raise ValueError(
            f"{at}contains a variable such as $NAME, which is not expanded; write a $ in a password as %24"
        )


def _pairs(query: str, at: str) -> Iterator[tuple[str, str]]:
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):
            raise ValueError(f"{at}needs KEY=VALUE after the ?; write a ? in a password as %3F")
        yield key, unquote(value, errors="strict")


def _hosts(host_key: str, servers: str, ports: str) -> Iterator[tuple[str, int]]:
    """Yield hosts and ports as libpq does: the key `host` overrides the hosts before the path."""
    names = (
        host_key.split(",")
        if host_key
        else [unquote(s, errors="strict") for s in servers.split(",")]
        if servers
        else []
    )
    port_list = ports.split(",") if ports else [""]
    if names and len(port_list) not in (1, len(names)):
        raise ValueError(f"names {len(names)} hosts and {len(port_list)} ports")
    for number, name in enumerate(names):
        match = _HOST.fullmatch(name)
        host = match and (match["path"] or match["ip"] or match["name"])
        if not match or not host or (match["ip"] and not _is_address(host)):
            raise ValueError(f"needs a host name or an address, an IPv6 address in [ ]: {FORM}")
        port = port_list[number % len(port_list)] or match["p1"] or match["p2"] or match["p3"] or str(PORT)
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{host}: needs a port from 1 to 65535")
        yield host, int(port)


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.IPv6Address(host))
    return False


def _refuse_keys(address: Address) -> None:
    at = f"{address.where}: "
    for key in address.query:
        if key in _UNSUPPORTED_KEYS:
            raise ValueError(f"{at}does not support {key}: {_UNSUPPORTED_KEYS[key]}")
        if key not in SUPPORTED_KEYS:
            raise ValueError(f"{at}does not support {key}; supported: {', '.join(sorted(SUPPORTED_KEYS))}")
    for key in CHOICES:
        if problem := invalid_choice(key, address.query.get(key)):
            raise ValueError(f"{at}{problem}")


def invalid_choice(key: str, value: str | None, variable: str = "") -> str:
    """Return why the value of a key, or of the environment variable `variable` that replaces the key, is invalid;
    return an empty text if the value is valid."""
    allowed, introduction = CHOICES[key]
    if value is None or value in allowed:
        return ""
    shown = f" {value}" if re.fullmatch(r"[\w.-]+", value) else " with this value"
    return f"does not support {variable or key}{shown}; {introduction} {', '.join(allowed)}"
