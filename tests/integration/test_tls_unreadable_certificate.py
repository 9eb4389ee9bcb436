"""Formerly, a certificate in a folder that the daemon may not enter (only root may enter /etc/letsencrypt/live) ended
the start with a traceback, and the handler of SIGHUP with another, because the search for the reason failed as well.
The error is now a ConfigError that names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nexhb.config import ServerSettings
from nexhb.errors import ConfigError
from nexhb.http.transport import tls
from tests.tls import certificate


@contextmanager
def nobody() -> Iterator[None]:
    """Become the user nobody within the block, because root may enter every folder."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    cert_file, key_file = certificate(folder, "x")
    settings = ServerSettings(tls_cert_file=cert_file, tls_key_file=key_file)
    serving = tls.context(settings)
    assert serving is not None
    folder.chmod(0)
    try:
        with nobody():
            with pytest.raises(ConfigError, match=r"cert\.pem cannot be read: Permission denied"):
                tls.context(settings)
            assert not tls.renew(serving, settings)
    finally:
        folder.chmod(0o700)
