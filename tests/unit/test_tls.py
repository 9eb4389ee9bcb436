"""The daemon's certificate and key are read at the start and again while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from nexhb.config import ServerSettings
from nexhb.errors import ConfigError
from nexhb.http.transport import tls
from tests.tls import accept_any_certificate, certificate


def served(context: ssl.SSLContext) -> str:
    """Return the name in the certificate that a handshake receives; both ends are in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = accept_any_certificate().wrap_bio(to_client, to_server)
    for _ in range(5):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    der = client.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).subject.rfc4514_string()


def test_half_of_a_new_pair_does_not_replace_a_valid_one(tmp_path: Path) -> None:
    """A renewal writes the certificate and the key one after the other, so a reload may read a pair that does not
    match."""
    cert, key = certificate(tmp_path, "first")
    settings = ServerSettings(tls_cert_file=cert, tls_key_file=key)
    serving = tls.context(settings)
    assert serving is not None
    before = key.read_bytes()
    certificate(tmp_path, "second")
    after = key.read_bytes()
    for half in (before, b"", after[:100]):
        key.write_bytes(half)
        assert not tls.renew(serving, settings)
        assert served(serving) == "CN=first"
    key.write_bytes(after)
    assert tls.renew(serving, settings)
    assert served(serving) == "CN=second"


def test_a_key_with_a_password_is_refused_without_a_prompt(tmp_path: Path) -> None:
    """Otherwise OpenSSL would prompt on the terminal, and the start would wait forever."""
    cert, key = certificate(tmp_path, "x")
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="the key is encrypted"):
        tls.context(ServerSettings(tls_cert_file=cert, tls_key_file=key))
