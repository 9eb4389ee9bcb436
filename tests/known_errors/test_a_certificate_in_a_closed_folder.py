"""A certificate in a folder that the daemon may not enter (/etc/letsencrypt/live is root's alone) ended the start with
a traceback, and SIGHUP's handler with another, because the search for the reason failed as well. It is a ConfigError
that names the file now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nexhb.config import Server
from nexhb.errors import ConfigError
from nexhb.http import tls
from tests.tls import certificate


@contextmanager
def nobody() -> Iterator[None]:
    """Root may enter everywhere; for the block we are not root."""
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
    settings = Server(tls_cert_file=cert_file, tls_key_file=key_file)
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
