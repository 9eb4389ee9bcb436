"""TLS served by the daemon itself, for installations without a reverse proxy."""

from __future__ import annotations

import ssl
from pathlib import Path

from nexhb import log
from nexhb.config import ServerSettings
from nexhb.errors import ConfigError

_log = log.get("http")


def context(settings: ServerSettings) -> ssl.SSLContext | None:
    """Return a context with server.tls_cert_file and server.tls_key_file, or None if they are not set. Raise
    ConfigError."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    created = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    created.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(created, settings)
    return created


def renew(serving: ssl.SSLContext, settings: ServerSettings) -> bool:
    """Read the certificate and the key again for all later handshakes. Return False if they cannot be read; the
    previous ones then stay in use."""
    try:
        context(settings)  # tested in a separate context, because half of a new pair must not replace a valid one
        _load(serving, settings)
    except ConfigError as error:
        _log.error("tls.not_renewed", error=str(error))
        return False
    _log.info("tls.renewed", certificate=str(settings.tls_cert_file))
    return True


class Certificate:
    """The certificate that the daemon serves, and whether its last renewal failed."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.context = context(settings)
        self.trouble = ""

    def renew(self) -> bool:
        """Read the certificate again. Return False if that failed; then the previous one stays in use."""
        renewed = self.context is None or renew(self.context, self._settings)
        self.trouble = "" if renewed else "the certificate could not be renewed, see the log"
        return renewed


def _load(into: ssl.SSLContext, settings: ServerSettings) -> None:
    cert, key = settings.tls_cert_file, settings.tls_key_file
    assert cert is not None  # noqa: S101 - `context` returns before if it is None
    assert key is not None  # noqa: S101 - likewise
    try:
        into.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = _reason(error, cert, key)
        raise ConfigError(f"server.tls_cert_file {cert}, server.tls_key_file {key}: {reason}.") from error


def _reason(error: Exception, *paths: Path) -> str:
    for path in paths:  # the error of ssl does not name the file
        try:
            with path.open("rb"):
                pass
        except FileNotFoundError:
            return f"file {path} not found"
        except OSError as unreadable:
            return f"{path} cannot be read: {unreadable.strerror}"
    return str(error)


def _no_password() -> str:
    raise ValueError("the key is encrypted, and the daemon cannot ask for its password")
