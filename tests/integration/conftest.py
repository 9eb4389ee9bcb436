"""S3 servers: moto within the session's process, and a real OpenStack Swift."""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable, Iterator

import aioboto3
import pytest

from nexhb.config import Archive
from tests import swift as swift_module
from tests.swift import S3Server

_buckets = itertools.count(1)
MakeBucket = Callable[[S3Server], Awaitable[Archive]]


@pytest.fixture(scope="session")
def swift() -> Iterator[S3Server]:
    """A real S3 server."""
    with swift_module.running() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """What looks like AWS: it knows much, and checks little."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}", "moto-key", "moto-secret")
    server.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no AWS credentials or settings can be found, the machine's own included."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    return monkeypatch


@pytest.fixture(scope="session")
def session() -> aioboto3.Session:
    """For the tests' own requests; one, since each reads a megabyte of service descriptions."""
    return aioboto3.Session()


@pytest.fixture
def make_bucket(aws: pytest.MonkeyPatch, session: aioboto3.Session) -> MakeBucket:
    """A new bucket on a server, its credentials in the environment: the archive's settings for it."""

    async def make(server: S3Server) -> Archive:
        aws.setenv("AWS_ACCESS_KEY_ID", server.key)
        aws.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
        bucket = f"bucket-{next(_buckets)}"
        keys = {"aws_access_key_id": server.key, "aws_secret_access_key": server.secret}
        async with session.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys) as client:
            await client.create_bucket(Bucket=bucket)
        return Archive(url=f"s3://{bucket}/nexhb/archive", endpoint_url=server.url, region="us-east-1")

    return make
