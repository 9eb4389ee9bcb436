"""The nightly run with S3: a real server, and failures on the way to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aioboto3
import pytest

from nexhb.archive import catalog, restore, verify
from nexhb.postgres.connections import Connection, Database
from tests.support.nightly import NOW, OLD
from tests.support.nightly_s3 import Bucket, MakeBucket
from tests.swift import S3Server


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server:
    """Return the server that the test's parameter names."""
    result: S3Server = request.getfixturevalue(request.param)
    return result


@pytest.fixture
async def bucket(
    database: Database, conn: Connection, tmp_path: Path, make_bucket: MakeBucket, server: S3Server
) -> Bucket:
    """A database with the nightly run, and a bucket."""
    return Bucket(database, conn, tmp_path, await make_bucket(server))


@pytest.mark.parametrize("server", ["swift", "moto"], indirect=True)
async def test_a_day_is_archived_in_s3_and_restored_equal_row_by_row(bucket: Bucket) -> None:
    await bucket.fill(OLD)
    before = await bucket.rows(OLD)
    run = await bucket.nightly_s3()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["dropped"] == run.counts["drilled"] == 1
    [archived] = await catalog.find(bucket.conn, OLD)
    assert archived.url.startswith(f"{bucket.archive.url}/device_heartbeats_")
    async with bucket.opened() as store:
        assert (await verify.verify(store, store.name_of(archived.url), archived.sha256)).rows == 150
        assert await restore.restore_day(bucket.conn, store, [archived], NOW) == 150
    assert await bucket.rows(OLD) == before
    await catalog.release(bucket.conn, OLD)
    assert (await bucket.nightly_s3()).counts["dropped"] == 1  # the same objects exist already


@pytest.mark.parametrize("server", ["swift"], indirect=True)
async def test_an_object_overwritten_in_the_bucket_is_detected_and_replaced_from_the_table(
    bucket: Bucket, server: S3Server, session: aioboto3.Session
) -> None:
    await bucket.fill(OLD)
    await bucket.killed_at("manifest stored")
    keys = {"aws_access_key_id": server.key, "aws_secret_access_key": server.secret}
    async with session.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys) as client:
        name = str(bucket.archive.url).removeprefix("s3://").partition("/")[0]
        listed = await client.list_objects_v2(Bucket=name)
        for one in listed["Contents"]:
            await client.put_object(Bucket=name, Key=one["Key"], Body=b"something else")
    run = await bucket.nightly_s3()
    assert (run.status, run.reason) == ("completed", "")
    [archived] = await catalog.find(bucket.conn, OLD)
    async with bucket.opened() as store:
        assert (await verify.verify(store, store.name_of(archived.url), archived.sha256)).rows == 150


@pytest.mark.parametrize("server", ["swift"], indirect=True)
@pytest.mark.parametrize("wrong", ["secret", "bucket", "endpoint"])
async def test_an_unusable_store_is_named_and_the_next_run_recovers(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, server: S3Server, wrong: str
) -> None:
    await bucket.fill(OLD)
    right = bucket.archive
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-anybody")
    if wrong == "bucket":
        bucket.archive = right.model_copy(update={"url": "s3://no-such-bucket/x"})
    if wrong == "endpoint":
        bucket.archive = right.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    run = await bucket.nightly_s3()
    state = await bucket.state(OLD)
    assert (run.status, state["state"]) == ("failed", "archive_failed")
    message = {"secret": "SignatureDoesNotMatch", "bucket": "NoSuchBucket", "endpoint": "127.0.0.1:9"}[wrong]
    assert message in state["reason"]
    assert server.secret not in run.reason
    assert "not-the-secret" not in run.reason
    assert run.counts["created"] > 0
    bucket.archive = right
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    assert (await bucket.nightly_s3()).status == "completed"
    assert (await bucket.state(OLD))["state"] == "dropped"


@pytest.mark.parametrize("server", ["moto"], indirect=True)
async def test_a_store_that_hangs_costs_no_more_than_the_timeout(bucket: Bucket) -> None:
    await bucket.fill(OLD)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        right = bucket.archive
        bucket.archive = right.model_copy(update={"endpoint_url": f"http://127.0.0.1:{port}", "timeout_seconds": 1.0})
        run = await bucket.nightly_s3()
    assert run.status == "failed"
    assert run.elapsed_ms < 20_000
    assert "longer than 1 s" in (await bucket.state(OLD))["reason"]
    assert await bucket.conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    bucket.archive = right
    assert (await bucket.nightly_s3()).status == "completed"
