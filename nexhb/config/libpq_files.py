"""The files and variables in which libpq looks for passwords and certificates that are not in the URL. asyncpg reads
the same files and variables, but it does not unescape the passwords in a password file, and its errors do not name most
of the files that it cannot read."""

from __future__ import annotations

import getpass
import os
import re
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from nexhb.config.database_url import PORT, TLS_MODES, Address, invalid_choice
from nexhb.errors import ConfigError

_VARIABLES = {
    "sslmode": "PGSSLMODE", "target_session_attrs": "PGTARGETSESSIONATTRS", "sslnegotiation": "PGSSLNEGOTIATION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION", "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "gsslib": "PGGSSLIB",
}  # fmt: skip
_FIELD = re.compile(r"((?:\\.|[^\\:])*):")
_ESCAPED = re.compile(r"\\(.)")


def check(address: Address, name: str) -> None:
    """Raise ConfigError if a file that the URL or libpq's variables name is not usable. `name` is the setting that
    holds the URL."""
    prefix = f"{name}: {address.where}"
    _check_variables(address, prefix)
    _check_user(address, prefix)
    _check_password_file(address, prefix)
    if address.is_local:
        return
    mode = address.query.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    if TLS_MODES.index(mode) < TLS_MODES.index("require") and "direct" in (
        address.query.get("sslnegotiation"), os.environ.get("PGSSLNEGOTIATION"),
    ):  # fmt: skip
        raise ConfigError(f"{prefix}: sslnegotiation=direct needs sslmode=require or stricter.")
    if mode != "disable":
        _check_certificates(address, mode, prefix)


def password(address: Address) -> str | None:
    """Return the password for a URL that has none: from PGPASSWORD, else from the password file, as libpq does."""
    if value := os.environ.get("PGPASSWORD"):
        return value
    path = _password_file(address)[0]
    with suppress(OSError, UnicodeDecodeError, ValueError, KeyError):
        if path is not None and _is_private(path):
            return _find_password(path.read_text(encoding="utf-8"), address)
    return None


def _password_file(address: Address) -> tuple[Path | None, str]:
    """Return the path, and the key or variable that sets it (empty for libpq's default path)."""
    if path := address.query.get("passfile"):
        return Path(path), "passfile"
    if path := os.environ.get("PGPASSFILE"):
        return Path(path), "PGPASSFILE"
    return _in_home(".pgpass"), ""


def _in_home(*names: str) -> Path | None:
    with suppress(RuntimeError):
        return Path.home().joinpath(*names)
    return None


def _is_private(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) and not mode & 0o077


def _find_password(text: str, address: Address) -> str | None:
    user = _user(address)
    database = address.database or os.environ.get("PGDATABASE") or user
    hosts = address.hosts or ((os.environ.get("PGHOST") or "localhost", int(os.environ.get("PGPORT") or PORT)),)
    for host, port in hosts:
        accepted = ({host, "localhost"} if host.startswith("/") else {host}, {str(port)}, {database}, {user})
        for fields, rest in _lines(text):
            if all(
                name == "*" or _ESCAPED.sub(r"\1", name) in names for name, names in zip(fields, accepted, strict=True)
            ):
                return _ESCAPED.sub(r"\1", rest)
    return None


def _lines(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the first four fields of each line, still escaped, and the password of the line."""
    for line in text.split("\n"):
        fields: list[str] = []
        rest = line.rstrip("\r")
        while len(fields) < 4 and not line.startswith("#") and (match := _FIELD.match(rest)):
            fields.append(match[1])
            rest = rest[match.end() :]
        if len(fields) == 4:
            yield fields, rest


def _user(address: Address) -> str:
    return address.user or os.environ.get("PGUSER") or getpass.getuser()


def _check_variables(address: Address, prefix: str) -> None:
    for key, variable in _VARIABLES.items():
        if key not in address.query and (problem := invalid_choice(key, os.environ.get(variable) or None, variable)):
            raise ConfigError(f"{prefix}: {problem}.", hint=f"Correct the environment variable {variable}.")
    port = os.environ.get("PGPORT") or str(PORT)
    if not address.hosts and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{prefix}: PGPORT needs a port from 1 to 65535.")


def _check_user(address: Address, prefix: str) -> None:
    try:
        _user(address)
    except (KeyError, OSError, ImportError):
        raise ConfigError(
            f"{prefix}: names no user, and user id {os.geteuid()} has no name.", hint="Name the user: user@host."
        ) from None


def _check_password_file(address: Address, prefix: str) -> None:
    path, source = _password_file(address)
    if not source or path is None or address.password or os.environ.get("PGPASSWORD"):
        return
    prefix = f"{prefix}: {source} {path}"
    _check_readable(path, prefix)
    if not _is_private(path):
        raise ConfigError(f"{prefix} is ignored, since other users may read it.", hint=f"chmod 600 {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{prefix} is not UTF-8.") from None
    if _find_password(text, address) is None:
        raise ConfigError(
            f"{prefix} has no line for this host, port, database and user.",
            hint=r"A line is host:port:database:user:password; write : and \ in a value as \: and \\.",
        )


def _check_readable(path: Path, prefix: str) -> None:
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise ConfigError(f"{prefix} does not exist.", hint="Paths are absolute, and ~ is not expanded.") from None
    except OSError as error:
        raise ConfigError(f"{prefix} cannot be read: {error.strerror}.") from None


def _check_certificates(address: Address, mode: str, prefix: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    verifies = mode.startswith("verify-")
    if verifies or mode == "require":
        root = _file(address, "sslrootcert", "PGSSLROOTCERT", "root.crt", prefix)
        if root is None and verifies:
            raise ConfigError(
                f"{prefix}: sslmode={mode} needs the CA certificate that verifies the server, and none was found.",
                hint="Set sslrootcert=/path/to/ca.crt in the URL, or put the certificate into ~/.postgresql/root.crt.",
            )
        if root is not None:
            _load(lambda: context.load_verify_locations(cafile=root), f"{prefix}: sslrootcert {root}")
        if crl := _file(address, "sslcrl", "PGSSLCRL", "root.crl", prefix):
            _load(lambda: context.load_verify_locations(cafile=crl), f"{prefix}: sslcrl {crl}")
    key = _file(address, "sslkey", "PGSSLKEY", "postgresql.key", prefix)
    if cert := _file(address, "sslcert", "PGSSLCERT", "postgresql.crt", prefix):
        secret = address.query.get("sslpassword", "")
        _load(lambda: context.load_cert_chain(cert, key, lambda: secret), f"{prefix}: sslcert {cert}, sslkey {key}")


def _file(address: Address, key: str, variable: str, default: str, prefix: str) -> Path | None:
    """Return the file that the URL or the variable names, else the default file in ~/.postgresql if it exists."""
    named = address.query.get(key) or os.environ.get(variable)
    if named == "system":
        raise ConfigError(f"{prefix}: {key} system is not supported.",
                          hint="Name the file: /etc/ssl/certs/ca-certificates.crt on Debian.")  # fmt: skip
    path = Path(named) if named else _in_home(".postgresql", default)
    if path is None:
        return None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not named:
            return None
    except OSError:
        pass  # _check_readable reports this error
    _check_readable(path, f"{prefix}: {key} {path}")
    return path


def _load(load: Callable[[], None], prefix: str) -> None:
    try:
        load()
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no PEM"
        raise ConfigError(
            f"{prefix} cannot be used: {reason}.", hint="Files must be PEM, and a key must belong to its certificate."
        ) from None
