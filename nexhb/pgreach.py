"""Why PostgreSQL could not be reached: the cause in a sentence, and what to do, each with host and port."""

from __future__ import annotations

import errno
import re
import socket
import ssl

from nexhb.dburl import Address
from nexhb.errors import DatabaseUnavailable

_BY_STATE = {
    "28P01": ("the password of user {user} is wrong, or missing", "Correct {name}, PGPASSWORD or the password file."),
    "28000": ("PostgreSQL refuses user {user}: {said}", "Correct {name}, or pg_hba.conf and the role."),
    "3D000": ("there is no database {database}", "Create it: CREATE DATABASE {database}; or correct {name}."),
    "53300": ("PostgreSQL has no connection left: {said}", "Raise max_connections, or end other sessions."),
    "57P03": ("PostgreSQL takes no connections yet: {said}", "Wait until it has started."),
}
_BY_NUMBER = {
    errno.ECONNREFUSED: ("nothing listens there: connection refused", "Start PostgreSQL; check the port in {name}, "
                         "and listen_addresses."),
    errno.ENOENT: ("there is no socket", "Start PostgreSQL; check host and port in {name}."),
    errno.EACCES: ("the socket may not be used by this user", "Check who may enter its folder."),
    errno.EHOSTUNREACH: ("there is no way to this host", "Check the network and the host in {name}."),
    errno.ENETUNREACH: ("there is no way to this network", "Check the network and the host in {name}."),
}  # fmt: skip
_BY_CLASS: dict[type[BaseException], tuple[str, str]] = {
    socket.gaierror: ("the host's name is not known ({said})", "Check the host in {name}, and the name service."),
    ssl.SSLCertVerificationError: (
        "the server's certificate is refused: {said}",
        "sslrootcert names the CA that signed it; with verify-full it also bears the name in {name}.",
    ),
    TimeoutError: ("no answer in time", "Check the host in {name}, and the firewall before it."),
    ssl.SSLError: ("TLS does not come about: {said}", "Check sslmode in {name}, and the server's ssl settings."),
}
_NO_TLS = ("the server does not speak TLS, which sslmode asks for", "Turn its ssl on, or set sslmode=prefer.")


def explained(error: BaseException, address: Address, name: str) -> DatabaseUnavailable:
    """The error that says why; `name` is the key of the url."""
    cause, hint = _why(error)
    words = {
        "name": name, "user": address.user or "(of this system)", "database": address.database or "(named as the user)",
        "said": getattr(error, "verify_message", "") or str(error),
    }  # fmt: skip
    hosts = len({host for host, _ in address.hosts}) > 1
    return DatabaseUnavailable(
        f"{address.where}: {cause.format(**words)}.", hint=hint.format(**words) + " Every host was tried." * hosts
    )


def _why(error: BaseException) -> tuple[str, str]:
    if found := _BY_STATE.get(str(getattr(error, "sqlstate", ""))):
        return found
    if isinstance(error, OSError) and (found := _BY_NUMBER.get(_number(error))):
        return found
    rejected = "rejected SSL upgrade" in str(error)
    return next(
        (found for kind, found in _BY_CLASS.items() if isinstance(error, kind)),
        _NO_TLS if rejected else (f"{type(error).__name__}: {{said}}", ""),
    )


def _number(error: OSError) -> int:
    """The error's number; of several addresses that failed alike, which Python tells by text alone, theirs."""
    if error.errno is not None:
        return error.errno
    numbers = set(re.findall(r"\[Errno (\d+)\]", str(error)))
    return int(numbers.pop()) if len(numbers) == 1 else 0
