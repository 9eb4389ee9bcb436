"""Explain why PostgreSQL could not be reached: the cause, with host and port, and the remedy."""

from __future__ import annotations

import errno
import re
import socket
import ssl

from nexhb.config.database_url import Address
from nexhb.errors import DatabaseUnavailable

_BY_STATE = {
    "28P01": ("the password of user {user} is wrong or missing", "Correct {name}, PGPASSWORD or the password file."),
    "28000": ("PostgreSQL rejects user {user}: {message}", "Correct {name}, or pg_hba.conf and the role."),
    "3D000": ("database {database} does not exist", "Create it: CREATE DATABASE {database}; or correct {name}."),
    "53300": ("PostgreSQL has no connection left: {message}", "Raise max_connections, or end other sessions."),
    "57P03": ("PostgreSQL does not accept connections yet: {message}", "Wait until it has started."),
}
_BY_NUMBER = {
    errno.ECONNREFUSED: ("nothing listens there: connection refused", "Start PostgreSQL; check the port in {name}, "
                         "and listen_addresses."),
    errno.ENOENT: ("there is no socket", "Start PostgreSQL; check host and port in {name}."),
    errno.EACCES: ("this user may not use the socket", "Check the permissions of its folder."),
    errno.EHOSTUNREACH: ("no route to this host", "Check the network and the host in {name}."),
    errno.ENETUNREACH: ("no route to this network", "Check the network and the host in {name}."),
}  # fmt: skip
_BY_CLASS: dict[type[BaseException], tuple[str, str]] = {
    socket.gaierror: ("the host name does not resolve ({message})", "Check the host in {name}, and the name service."),
    ssl.SSLCertVerificationError: (
        "the server's certificate was rejected: {message}",
        "Set sslrootcert to the CA that signed it; with verify-full the certificate must also name the host in {name}.",
    ),
    TimeoutError: ("no response in time", "Check the host in {name}, and firewalls on the way."),
    ssl.SSLError: ("the TLS handshake failed: {message}", "Check sslmode in {name}, and the server's ssl settings."),
}
_NO_TLS = ("the server does not support TLS, which sslmode requires", "Turn its ssl on, or set sslmode=prefer.")


def explain(error: BaseException, address: Address, name: str) -> DatabaseUnavailable:
    """Return an error that explains the cause; `name` is the setting that holds the URL."""
    cause, hint = _cause(error)
    values = {
        "name": name, "user": address.user or "(the OS user)", "database": address.database or "(named like the user)",
        "message": getattr(error, "verify_message", "") or str(error),
    }  # fmt: skip
    hosts = len({host for host, _ in address.hosts}) > 1
    return DatabaseUnavailable(
        f"{address.where}: {cause.format(**values)}.", hint=hint.format(**values) + " All hosts were tried." * hosts
    )


def _cause(error: BaseException) -> tuple[str, str]:
    if cause := _BY_STATE.get(str(getattr(error, "sqlstate", ""))):
        return cause
    if isinstance(error, OSError) and (cause := _BY_NUMBER.get(_number(error))):
        return cause
    rejected = "rejected SSL upgrade" in str(error)
    return next(
        (cause for kind, cause in _BY_CLASS.items() if isinstance(error, kind)),
        _NO_TLS if rejected else (f"{type(error).__name__}: {{message}}", ""),
    )


def _number(error: OSError) -> int:
    """Return the errno. If several addresses failed alike, Python gives it only in the text."""
    if error.errno is not None:
        return error.errno
    numbers = set(re.findall(r"\[Errno (\d+)\]", str(error)))
    return int(numbers.pop()) if len(numbers) == 1 else 0
