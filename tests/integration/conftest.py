"""S3 servers: moto within the session's process, and a real OpenStack Swift. The nightly run, a proxy before the
database, and a writer that gives up early."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aioboto3
import pytest
from botocore.loaders import JSONFileLoader

from nexhb.config import ArchiveSettings
from nexhb.ingest import connection, writer
from nexhb.postgres.connections import Connection, Database
from tests import swift as swift_module
from tests.proxy import Proxy
from tests.support.nightly import House
from tests.support.nightly_s3 import MakeBucket
from tests.swift import S3Server

_buckets = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def _models_of_boto() -> Iterator[None]:
    """Read each of botocore's models once. Every client of nexhb has a session of its own, which would parse S3's model
    again."""
    load = functools.cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _self, path: load(path))
        yield


@pytest.fixture(scope="session")
def swift() -> Iterator[S3Server]:
    """Run a real S3 server."""
    with swift_module.running() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """Run an imitation of AWS, which supports most of its API but checks little."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}", "moto-key", "moto-secret")
    server.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove all AWS credentials and settings from the environment, including the machine's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    return monkeypatch


@pytest.fixture(scope="session")
def session() -> aioboto3.Session:
    """Return a session for the tests' own requests. All tests share it, because each session reads a megabyte of
    service descriptions."""
    return aioboto3.Session()


@pytest.fixture
def make_bucket(aws: pytest.MonkeyPatch, session: aioboto3.Session) -> MakeBucket:
    """Return a function that creates a bucket on a server, puts the server's credentials into the environment, and
    returns the archive's settings for the bucket."""

    async def make(server: S3Server) -> ArchiveSettings:
        aws.setenv("AWS_ACCESS_KEY_ID", server.key)
        aws.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
        bucket = f"bucket-{next(_buckets)}"
        keys = {"aws_access_key_id": server.key, "aws_secret_access_key": server.secret}
        async with session.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys) as client:
            await client.create_bucket(Bucket=bucket)
        return ArchiveSettings(url=f"s3://{bucket}/nexhb/archive", endpoint_url=server.url, region="us-east-1")

    return make


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[Proxy]:
    """Run a proxy in front of the test's database."""
    async with Proxy(database.dsn).serving() as proxy:
        yield proxy


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the writer's timeouts, so that a test of a lasting failure is short."""
    monkeypatch.setattr(writer, "RETRY_FOR_S", 0.5)
    monkeypatch.setattr(connection, "STATEMENT_TIMEOUT_S", 1.0)


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A database and an archive folder, with the nightly run."""
    return House(database, conn, tmp_path)
