"""A real PostgreSQL with passwords: each cause of a failed connection has its own message."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from nexhb.errors import ConfigError, DatabaseUnavailable
from nexhb.postgres import account as pg_account
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import is_retryable
from tests.tls import certificate

PASSWORD = r"gEh:E\im @/?#[%"
ENCODED = quote(PASSWORD, safe="")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Yield the port of a server. The wheel's PostgreSQL is built without TLS."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    folder.chmod(0o711)
    account = pg_account._find_account(folder / "none")
    bin_dir, _ = pg_account.find_binaries(folder, account)
    data = account.new_folder(folder / "data")
    secret = folder / "password"
    secret.write_text(PASSWORD)
    os.chown(secret, account.uid, account.gid)
    account.run(
        bin_dir / "initdb", "-D", data, "-E", "UTF8", "-U", "n", "-A", "scram-sha-256", "--pwfile", secret, "--no-sync"
    )
    port = free_port()
    options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    pg_ctl = (bin_dir / "pg_ctl", "-D", data, "-w", "-l", data / "log")
    account.run(*pg_ctl, "-o", options, "start")
    try:
        yield port
    finally:
        account.run(*pg_ctl, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


async def refusal(url: str, kind: type[Exception] = DatabaseUnavailable, **how: float) -> str:
    with pytest.raises(kind) as raised:
        await Database(url).connect(application="test", **how)  # type: ignore[arg-type]
    said = str(raised.value)
    assert "geh" not in said.lower()
    return said


async def test_each_cause_is_reported_with_host_port_and_remedy(port: int) -> None:
    good = f"n:{ENCODED}@127.0.0.1:{port}"
    conn = await Database(f"postgresql://{good}/postgres").connect(application="test")
    assert await conn.fetchval("SELECT current_user") == "n"
    await conn.close()
    at = f"127.0.0.1:{port}: "
    assert f"{at}the password of user n is wrong" in await refusal(f"postgresql://n:geheim@127.0.0.1:{port}/postgres")
    assert f"{at}the password of user n is wrong" in await refusal(f"postgresql://n@127.0.0.1:{port}/postgres")
    said = await refusal(f"postgresql://{good}/kiosks")
    assert f"{at}database kiosks does not exist. Create it: CREATE DATABASE kiosks" in said
    assert f"{at}the server does not support TLS" in await refusal(f"postgresql://{good}/postgres?sslmode=require")
    taken = free_port()
    said = await refusal(f"postgresql://{good.replace(str(port), str(taken))}/postgres")
    assert f"127.0.0.1:{taken}: nothing listens there" in said
    assert "the port in database.url" in said
    said = await refusal(f"postgresql://{good.replace('127.0.0.1', 'no.such.host.invalid')}/postgres")
    assert f"no.such.host.invalid:{port}: the host name does not resolve" in said
    said = await refusal(f"postgresql://{good.replace('127.0.0.1', 'a' * 70)}/postgres", ConfigError)
    assert "expected postgresql://" in said
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        number = deaf.getsockname()[1]
        said = await refusal(f"postgresql://{good.replace(str(port), str(number))}/postgres", timeout_s=0.2)
        assert f"127.0.0.1:{number}: no response in time" in said
    said = await refusal("postgresql://n@/postgres?host=/not/there")
    assert "/not/there:5432: there is no socket" in said


async def test_a_certificate_with_another_name_or_ca_is_reported_as_rejected(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "elsewhere.example")
    (tmp_path / "other").mkdir()
    other, _ = certificate(tmp_path / "other", "elsewhere.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # the request for TLS
        writer.write(b"S")
        with contextlib.suppress(OSError):
            await writer.start_tls(context)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        number = server.sockets[0].getsockname()[1]
        for query in (f"sslmode=verify-full&sslrootcert={cert}", f"sslmode=verify-ca&sslrootcert={other}"):
            said = await refusal(f"postgresql://n:geheim@127.0.0.1:{number}/x?{query}")
            assert f"127.0.0.1:{number}: the server's certificate was rejected: " in said


async def test_the_password_file_of_libpq_is_used(port: int, tmp_path: Path) -> None:
    """Formerly, if the password had a colon and a backslash, asyncpg sent another password than psql."""
    path = tmp_path / ".pgpass"
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    path.write_text(f"127.0.0.1:{port}:postgres:n:{escaped}\n")
    path.chmod(0o600)
    database = Database(f"postgresql://n@127.0.0.1:{port}/postgres")
    conn = await database.connect(application="test")
    await conn.close()
    pool = await database.pool(application="test", size=1, timeout_s=5)
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


@pytest.mark.parametrize(
    ("error", "again"),
    [(ConnectionRefusedError(111, "x"), True), (ssl.SSLCertVerificationError("x"), True), (TimeoutError(), True),
     (socket.gaierror(-2, "x"), True), (asyncpg.InvalidPasswordError("x"), False),
     (asyncpg.InvalidCatalogNameError("x"), False)],
)  # fmt: skip
def test_a_start_waits_only_after_errors_that_may_be_temporary(error: Exception, again: bool) -> None:
    assert is_retryable(error) is again
