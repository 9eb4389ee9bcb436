"""What a connection to PostgreSQL needs besides its url: the files and variables in which libpq looks for passwords
and certificates. asyncpg reads the same, but undoes no escape in a password file, and names few of the files that it
misses."""

from __future__ import annotations

import getpass
import os
import re
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from nexhb.dburl import PORT, TLS_MODES, Address, wrong_choice
from nexhb.errors import ConfigError

_VARIABLES = {
    "sslmode": "PGSSLMODE", "target_session_attrs": "PGTARGETSESSIONATTRS", "sslnegotiation": "PGSSLNEGOTIATION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION", "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "gsslib": "PGGSSLIB",
}  # fmt: skip
_FIELD = re.compile(r"((?:\\.|[^\\:])*):")
_ESCAPED = re.compile(r"\\(.)")


def check(address: Address, name: str) -> None:
    """Raise ConfigError where a file that the url or libpq's variables name is not usable; `name` is the url's key."""
    said = f"{name}: {address.where}"
    _check_variables(address, said)
    _check_user(address, said)
    _check_password_file(address, said)
    if address.is_local:
        return
    mode = address.query.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    if TLS_MODES.index(mode) < TLS_MODES.index("require") and "direct" in (
        address.query.get("sslnegotiation"), os.environ.get("PGSSLNEGOTIATION"),
    ):  # fmt: skip
        raise ConfigError(f"{said}: sslnegotiation=direct needs sslmode=require or stricter.")
    if mode != "disable":
        _check_certificates(address, mode, said)


def password(address: Address) -> str | None:
    """The password of a url that has none: from PGPASSWORD, else from the password file, as libpq finds it."""
    if given := os.environ.get("PGPASSWORD"):
        return given
    path = _password_file(address)[0]
    with suppress(OSError, UnicodeDecodeError, ValueError, KeyError):
        if path is not None and _is_private(path):
            return _found(path.read_text(encoding="utf-8"), address)
    return None


def _password_file(address: Address) -> tuple[Path | None, str]:
    """Where it lies, and who says so; empty for libpq's own place."""
    if named := address.query.get("passfile"):
        return Path(named), "passfile"
    if named := os.environ.get("PGPASSFILE"):
        return Path(named), "PGPASSFILE"
    return _in_home(".pgpass"), ""


def _in_home(*names: str) -> Path | None:
    with suppress(RuntimeError):
        return Path.home().joinpath(*names)
    return None


def _is_private(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) and not mode & 0o077


def _found(text: str, address: Address) -> str | None:
    user = _user(address)
    database = address.database or os.environ.get("PGDATABASE") or user
    hosts = address.hosts or ((os.environ.get("PGHOST") or "localhost", int(os.environ.get("PGPORT") or PORT)),)
    for host, port in hosts:
        wanted = ({host, "localhost"} if host.startswith("/") else {host}, {str(port)}, {database}, {user})
        for fields, rest in _lines(text):
            if all(one == "*" or _ESCAPED.sub(r"\1", one) in each for one, each in zip(fields, wanted, strict=True)):
                return _ESCAPED.sub(r"\1", rest)
    return None


def _lines(text: str) -> Iterator[tuple[list[str], str]]:
    """The first four fields of each line as they stand, and its password."""
    for line in text.split("\n"):
        fields: list[str] = []
        rest = line.rstrip("\r")
        while len(fields) < 4 and not line.startswith("#") and (found := _FIELD.match(rest)):
            fields.append(found[1])
            rest = rest[found.end() :]
        if len(fields) == 4:
            yield fields, rest


def _user(address: Address) -> str:
    return address.user or os.environ.get("PGUSER") or getpass.getuser()


def _check_variables(address: Address, said: str) -> None:
    for key, variable in _VARIABLES.items():
        if key not in address.query and (wrong := wrong_choice(key, os.environ.get(variable) or None, variable)):
            raise ConfigError(f"{said}: {wrong}.", hint=f"Correct the environment variable {variable}.")
    port = os.environ.get("PGPORT") or str(PORT)
    if not address.hosts and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{said}: PGPORT takes a port from 1 to 65535.")


def _check_user(address: Address, said: str) -> None:
    try:
        _user(address)
    except (KeyError, OSError, ImportError):
        raise ConfigError(
            f"{said}: names no user, and user id {os.geteuid()} has no name.", hint="Write it: user@host."
        ) from None


def _check_password_file(address: Address, said: str) -> None:
    path, by = _password_file(address)
    if not by or path is None or address.password or os.environ.get("PGPASSWORD"):
        return
    said = f"{said}: {by} {path}"
    _refuse_unreadable(path, said)
    if not _is_private(path):
        raise ConfigError(f"{said} is ignored, since others may read it.", hint=f"chmod 600 {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{said} is not UTF-8.") from None
    if _found(text, address) is None:
        raise ConfigError(
            f"{said} has no line for this host, port, database and user.",
            hint=r"A line is host:port:database:user:password, with : and \ in a value written \: and \\.",
        )


def _refuse_unreadable(path: Path, said: str) -> None:
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise ConfigError(f"{said} is not there.", hint="Paths are absolute, and ~ is not expanded.") from None
    except OSError as error:
        raise ConfigError(f"{said} cannot be read: {error.strerror}.") from None


def _check_certificates(address: Address, mode: str, said: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    verifies = mode.startswith("verify-")
    if verifies or mode == "require":
        root = _file(address, "sslrootcert", "PGSSLROOTCERT", "root.crt", said)
        if root is None and verifies:
            raise ConfigError(
                f"{said}: sslmode={mode} needs the certificate of the CA that signed the server's, and there is none.",
                hint="Name it: sslrootcert=/path/to/ca.crt in the url, or put it into ~/.postgresql/root.crt.",
            )
        if root is not None:
            _load(lambda: context.load_verify_locations(cafile=root), f"{said}: sslrootcert {root}")
        if crl := _file(address, "sslcrl", "PGSSLCRL", "root.crl", said):
            _load(lambda: context.load_verify_locations(cafile=crl), f"{said}: sslcrl {crl}")
    key = _file(address, "sslkey", "PGSSLKEY", "postgresql.key", said)
    if cert := _file(address, "sslcert", "PGSSLCERT", "postgresql.crt", said):
        secret = address.query.get("sslpassword", "")
        _load(lambda: context.load_cert_chain(cert, key, lambda: secret), f"{said}: sslcert {cert}, sslkey {key}")


def _file(address: Address, key: str, variable: str, usual: str, said: str) -> Path | None:
    """The file that the url or the variable names, else the one in ~/.postgresql if it is there."""
    named = address.query.get(key) or os.environ.get(variable)
    if named == "system":
        raise ConfigError(f"{said}: {key} system is not supported.",
                          hint="Name the file: /etc/ssl/certs/ca-certificates.crt on Debian.")  # fmt: skip
    path = Path(named) if named else _in_home(".postgresql", usual)
    if path is None:
        return None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not named:
            return None
    except OSError:
        pass  # said below
    _refuse_unreadable(path, f"{said}: {key} {path}")
    return path


def _load(load: Callable[[], None], said: str) -> None:
    try:
        load()
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or "no PEM"
        raise ConfigError(f"{said} cannot be used: {why}.", hint="Both are PEM, and belong together.") from None
