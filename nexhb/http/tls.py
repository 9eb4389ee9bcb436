"""TLS in the daemon itself, for those without a proxy before it."""

from __future__ import annotations

import ssl
from pathlib import Path

from nexhb import log
from nexhb.config import Server
from nexhb.errors import ConfigError

_log = log.get("http")


def context(settings: Server) -> ssl.SSLContext | None:
    """As server.tls_cert_file and server.tls_key_file say; None without them. Raises ConfigError naming the key."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(made, settings)
    return made


def renew(serving: ssl.SSLContext, settings: Server) -> bool:
    """Read certificate and key again: every handshake from now on sees them. False where they cannot be read: then what
    was there stays."""
    try:
        context(settings)  # on the side first: half of a new pair must not replace a good one
        _load(serving, settings)
    except ConfigError as error:
        _log.error("tls.not_renewed", error=str(error))
        return False
    _log.info("tls.renewed", certificate=str(settings.tls_cert_file))
    return True


def _load(made: ssl.SSLContext, settings: Server) -> None:
    cert, key = settings.tls_cert_file, settings.tls_key_file
    assert cert is not None  # noqa: S101 - see context
    assert key is not None  # noqa: S101
    try:
        made.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        why = _why(error, cert, key)
        raise ConfigError(f"server.tls_cert_file {cert}, server.tls_key_file {key}: {why}.") from error


def _why(error: Exception, *paths: Path) -> str:
    for path in paths:  # ssl's own error does not say which of the two it is
        try:
            with path.open("rb"):
                pass
        except FileNotFoundError:
            return f"there is no file {path}"
        except OSError as unreadable:
            return f"{path} cannot be read: {unreadable.strerror}"
    return str(error)


def _no_password() -> str:
    raise ValueError("the key is encrypted; nobody is there to type its password")
