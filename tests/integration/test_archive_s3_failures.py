"""Failures of an S3 store and of the connection to it. A small fake server causes the failures that Swift cannot cause
on demand."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from nexhb.archive.opening import open_store
from nexhb.archive.s3 import Bucket, open_bucket
from nexhb.archive.store import CHUNK, Store
from nexhb.config import ArchiveSettings
from nexhb.errors import ObjectExists, ObjectMissing, StoreError
from tests.limited_s3 import error, limited_s3
from tests.support.nightly_s3 import MakeBucket
from tests.support.objects import NAME, Body, body_of, read
from tests.swift import S3Server

SECRET = "the-secret-of-these-tests"
ADDRESS = f"s3://bucket/nexhb/{NAME}"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fake:
    """A store that responds to each method as the test prescribes, and records the requests and what was stored."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)
    stored: bytes | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        default = {"HEAD": self.head, "PUT": self.put, "GET": self.get}
        return await self.handlers.get(request.method, default[request.method])(request)

    async def head(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404 if self.stored is None else 200)

    async def put(self, request: web.Request) -> web.StreamResponse:
        self.stored = await request.content.read()
        return web.Response()

    async def get(self, request: web.Request) -> web.StreamResponse:
        return error(404, "NoSuchKey") if self.stored is None else web.Response(body=self.stored)

    def methods(self) -> list[str]:
        return [request.method for request in self.requests]


def each(*responses: Callable[[web.Request], Any]) -> Handler:
    """Return these responses in turn, then repeat the last one."""
    left = list(responses)

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = (left.pop(0) if len(left) > 1 else left[0])(request)
        response: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
        return response

    return handle


@pytest.fixture
async def fake() -> AsyncIterator[tuple[Fake, str]]:
    fake = Fake()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", fake.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield fake, site.name
    await runner.cleanup()


Opening = Callable[..., Awaitable[Store]]


@pytest.fixture
async def opened(aws: pytest.MonkeyPatch) -> AsyncIterator[Opening]:
    """Open s3://bucket/nexhb on an endpoint."""
    aws.setenv("AWS_ACCESS_KEY_ID", "key-of-these-tests")
    aws.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with AsyncExitStack() as stack:

        async def open_it(url: str | None, **settings: Any) -> Store:
            archive = ArchiveSettings(endpoint_url=url, region="us-east-1", **{"timeout_seconds": 60} | settings)
            return await stack.enter_async_context(open_bucket("s3://bucket/nexhb", archive))

        yield open_it


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return body_of(tmp_path, os.urandom(2 * CHUNK))


def hurried(store: Store) -> Bucket:
    """Return the open store with a limit of one second per operation; on a busy machine, opening takes longer."""
    assert isinstance(store, Bucket)
    return replace(store, timeout_s=1)


async def refused_once(begun: asyncio.Event, store: Store, body: Body) -> None:
    """Assert that a put times out. If the time ran out before the put began, repeat the put."""
    while True:
        assert "took longer than 1 s" in await refused(store, body)
        if begun.is_set():
            return


async def refused(store: Store, body: Body) -> str:
    """Return the error message of a put, which must fail."""
    with pytest.raises(StoreError) as caught:
        await store.put(NAME, body.path, body.sha256)
    assert not isinstance(caught.value, ObjectExists | ObjectMissing)
    assert SECRET not in str(caught.value)
    assert ADDRESS in str(caught.value)
    return str(caught.value)


async def test_a_put_is_one_request_streamed_and_checked_by_the_store(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    store = await opened(url)
    await store.put(NAME, body.path, body.sha256)
    assert server.methods() == ["HEAD", "PUT"]
    assert server.stored == body.content
    headers = server.requests[1].headers
    assert headers["If-None-Match"] == "*"
    assert headers["Content-Length"] == str(len(body.content))
    assert headers["Expect"] == "100-continue"  # the store can refuse before the body is sent
    # The payload is unsigned over http too, because hashing the body again, on the event loop, would delay heartbeats.
    assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert "x-amz-checksum-sha256" in headers["Authorization"]
    for name in ("Content-Encoding", "Content-Disposition", "x-amz-trailer", "x-amz-checksum-crc32", "Content-MD5"):
        assert name not in headers


async def test_replacing_sends_no_condition(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    store = await opened(url)
    await store.put(NAME, body.path, body.sha256, overwrite=True)
    assert server.methods() == ["PUT"]
    assert "If-None-Match" not in server.requests[0].headers


async def test_expired_credentials_are_explained_with_a_remedy(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    server.handlers["HEAD"] = each(lambda _: web.Response(status=400))
    server.handlers["PUT"] = each(lambda _: error(400, "ExpiredToken", "The provided token has expired."))
    message = await refused(await opened(url), body)
    assert "ExpiredToken (400): The provided token has expired." in message
    assert "Renew the credentials" in message
    assert url.removeprefix("http://") in message


async def test_after_slow_down_the_body_is_sent_again_from_its_start(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake

    async def after_the_body(request: web.Request) -> web.StreamResponse:
        await request.content.read()
        return error(503, "SlowDown", "Reduce your request rate.")

    server.handlers["PUT"] = each(after_the_body, server.put)
    store = await opened(url)
    await store.put(NAME, body.path, body.sha256)
    assert server.methods() == ["HEAD", "PUT", "PUT"]
    assert server.stored == body.content


async def test_after_three_slow_down_responses_the_put_fails(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    server.handlers["PUT"] = each(lambda _: error(503, "SlowDown", "Reduce your request rate."))
    assert "SlowDown (503): Reduce your request rate." in await refused(await opened(url), body)
    assert server.methods() == ["HEAD", "PUT", "PUT", "PUT"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda _: error(507, "InsufficientStorage"), "InsufficientStorage (507)"),
        (lambda _: web.Response(status=507, text="<html>full</html>", content_type="text/html"), "507 (507)"),
        (lambda _: error(403, "QuotaExceeded"), "QuotaExceeded (403)"),
    ],
    ids=["code", "html", "quota"],
)
async def test_a_full_store_is_explained_with_a_remedy(
    fake: Any, opened: Opening, body: Body, answer: Any, words: str
) -> None:
    server, url = fake
    server.handlers["PUT"] = each(answer)
    message = await refused(await opened(url), body)
    assert words in message
    assert "Free space in the store" in message


async def test_a_put_omits_a_condition_that_the_store_does_not_support(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    server.handlers["PUT"] = each(lambda _: error(501, "NotImplemented"), server.put)
    store = await opened(url)
    await store.put(NAME, body.path, body.sha256)
    assert server.stored == body.content
    assert ["If-None-Match" in request.headers for request in server.requests] == [False, True, False]


async def test_a_store_that_ignores_the_condition_is_not_overwritten(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    server.stored = b"what was there"
    store = await opened(url)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)
    assert server.stored == b"what was there"


async def test_nothing_is_put_if_the_store_supports_no_condition_and_does_not_answer_head(
    fake: Any, opened: Opening, body: Body
) -> None:
    server, url = fake
    server.handlers["HEAD"] = each(lambda _: web.Response(status=403))
    server.handlers["PUT"] = each(lambda _: error(501, "NotImplemented"))
    assert "NotImplemented (501)" in await refused(await opened(url), body)
    assert server.methods() == ["HEAD", "PUT", "PUT"]  # the store may not support the checksum
    assert all("If-None-Match" in request.headers for request in server.requests[1:])


CHECKSUM, CONDITION = "x-amz-checksum-sha256", "If-None-Match"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("refuses", "left_out"),
    [
        ({CHECKSUM: (400, "InvalidArgument")}, {CHECKSUM}),
        ({CHECKSUM: (501, "NotImplemented")}, {CHECKSUM}),
        ({CHECKSUM: (400, "SomethingOfItsOwn")}, {CHECKSUM}),
        ({CONDITION: (400, "InvalidRequest")}, {CONDITION}),
        ({CONDITION: (501, "NotImplemented")}, {CONDITION}),
        ({CHECKSUM: (400, "InvalidRequest"), CONDITION: (501, "NotImplemented")}, {CHECKSUM, CONDITION}),
    ],
)
async def test_unsupported_headers_are_omitted_and_remembered(
    opened: Opening, body: Body, refuses: Any, left_out: set[str], overwrite: bool
) -> None:
    """Backblaze B2 and others reject x-amz-checksum-sha256 with 400 or 501. Formerly, no day could ever be archived
    there."""
    async with limited_s3(**refuses) as server:
        store: Any = await opened(server.url)
        await store.put(NAME, body.path, body.sha256, overwrite=overwrite)
        assert await read(store, NAME) == body.content
        assert store.unsupported == (left_out - {CONDITION} if overwrite else left_out)
        server.puts.clear()
        await store.put("day/another", body.path, body.sha256, overwrite=overwrite)
        assert [status for _, status in server.puts] == [200]
        if not overwrite:
            with pytest.raises(ObjectExists):
                await store.put(NAME, body.path, body.sha256)


async def test_a_refusal_for_another_reason_is_not_retried_without_headers(
    fake: Any, opened: Opening, body: Body
) -> None:
    """After a refusal for another reason, such as bytes that changed in transit, nothing is sent again without its
    checksum."""
    server, url = fake
    server.handlers["PUT"] = each(lambda _: error(400, "BadDigest"), server.put)
    store: Any = await opened(url)
    assert "BadDigest (400)" in await refused(store, body)
    assert server.methods() == ["HEAD", "PUT"]
    assert (server.stored, store.unsupported) == (None, set())


async def test_if_omitting_headers_does_not_help_the_first_error_is_reported(
    fake: Any, opened: Opening, body: Body
) -> None:
    server, url = fake
    server.handlers["PUT"] = each(lambda _: error(400, "First"), lambda _: error(400, "Then"))
    store: Any = await opened(url)
    assert "First (400)" in await refused(store, body)
    assert (len(server.methods()), store.unsupported) == (5, set())


@pytest.mark.parametrize("code", ["PreconditionFailed", "ConditionalRequestConflict"])
async def test_an_object_that_appears_meanwhile_is_not_overwritten(
    fake: Any, opened: Opening, body: Body, code: str
) -> None:
    server, url = fake
    server.handlers["PUT"] = each(lambda _: error(412 if code == "PreconditionFailed" else 409, code))
    store = await opened(url)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)


@pytest.mark.parametrize("whose", ["ours", "another's"])
async def test_after_a_lost_response_the_existing_object_is_compared(
    fake: Any, opened: Opening, body: Body, whose: str
) -> None:
    server, url = fake

    async def stored_and_cut(request: web.Request) -> web.StreamResponse:
        await server.put(request)
        if whose != "ours":
            server.stored = bytes(len(body.content))
        assert request.transport
        request.transport.close()
        return web.Response()

    server.handlers["PUT"] = each(stored_and_cut, lambda _: error(412, "PreconditionFailed"))
    store = await opened(url)
    if whose == "ours":
        await store.put(NAME, body.path, body.sha256)
    else:
        with pytest.raises(ObjectExists):
            await store.put(NAME, body.path, body.sha256)
    assert server.methods() == ["HEAD", "PUT", "PUT", "GET"]


async def test_a_store_that_never_responds_costs_no_more_than_the_timeout(opened: Opening, body: Body) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await reader.read()
        writer.close()
        gone.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        store = hurried(await opened(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        before = asyncio.all_tasks()
        await refused_once(begun, store, body)
        await gone.wait()  # the connection is closed
        with pytest.raises(StoreError, match="took longer than 1 s"):
            await read(store, NAME)
        assert len(asyncio.all_tasks()) <= len(before) + 1  # the server's own task


async def test_a_store_that_stops_reading_the_body_costs_no_more_than_the_timeout(
    fake: Any, opened: Opening, body: Body
) -> None:
    server, url = fake
    begun, gone = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            await request.content.readexactly(CHUNK)
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            gone.set()

    server.handlers["PUT"] = hang
    store = hurried(await opened(url))
    await refused_once(begun, store, body)
    await gone.wait()


async def test_a_put_that_is_cancelled_closes_its_connection(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    begun, gone = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        try:
            await request.content.readexactly(CHUNK)
            begun.set()
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            gone.set()

    server.handlers["PUT"] = hang
    store = await opened(url)
    put = asyncio.create_task(store.put(NAME, body.path, body.sha256))
    await begun.wait()
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    await gone.wait()


def cut(request: web.Request, body: Body) -> Any:
    """Send a response that announces a body and breaks off in the middle of it."""

    async def answer() -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(body.content)
        await response.prepare(request)
        await response.write(body.content[: CHUNK + 5])
        assert request.transport
        request.transport.close()
        return response

    return answer()


async def test_a_truncated_body_is_an_error(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake
    server.handlers["GET"] = lambda request: cut(request, body)
    store = await opened(url)
    with pytest.raises(StoreError, match=f"get {ADDRESS}"):
        await read(store, NAME)
    assert "x-amz-checksum-mode" not in server.requests[0].headers  # not every store supports this header


async def test_a_body_without_a_length_is_refused(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake

    async def until_the_connection_closes(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body.content[:CHUNK])
        request.transport.close()
        return web.Response()

    server.handlers["GET"] = until_the_connection_closes
    store = await opened(url)
    with pytest.raises(StoreError, match="lacks its length"):
        await read(store, NAME)


async def test_a_body_that_stalls_costs_no_more_than_the_timeout(fake: Any, opened: Opening, body: Body) -> None:
    server, url = fake

    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(body.content)
        await response.prepare(request)
        await response.write(body.content[: CHUNK + 5])
        return await asyncio.Event().wait()  # type: ignore[return-value]

    server.handlers["GET"] = stall
    store = replace(hurried(await opened(url)), timeout_s=5)
    async with aclosing(store.get(NAME)) as chunks:
        assert await anext(chunks) == body.content[:CHUNK]
        with pytest.raises(StoreError, match=r"took longer than 5 s|did not respond in time"):
            await anext(chunks)


async def test_a_connection_that_breaks_off_in_a_put_is_tried_three_times(
    fake: Any, opened: Opening, body: Body
) -> None:
    server, url = fake

    async def broken(request: web.Request) -> web.StreamResponse:
        await request.content.readexactly(CHUNK)
        assert request.transport
        request.transport.abort()
        return web.Response()

    server.handlers["PUT"] = broken
    await refused(await opened(url), body)
    assert server.methods() == ["HEAD", "PUT", "PUT", "PUT"]


async def test_an_unreachable_store_is_explained(opened: Opening, body: Body) -> None:
    store = await opened("http://127.0.0.1:1")
    assert "the store at 127.0.0.1:1 cannot be reached" in await refused(store, body)


async def test_missing_credentials_are_explained_with_the_places_that_are_searched(
    opened: Opening, aws: pytest.MonkeyPatch, body: Body
) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    message = await refused(await opened("http://127.0.0.1:1"), body)
    assert "no credentials were found" in message
    assert "AWS_ACCESS_KEY_ID" in message


async def test_credentials_are_found_in_the_files_that_aws_uses(
    opened: Opening, fake: Any, aws: pytest.MonkeyPatch, body: Body, tmp_path: Path
) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[nightly]\naws_access_key_id = from-the-file\naws_secret_access_key = x\n")
    aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    aws.setenv("AWS_PROFILE", "nightly")
    server, url = fake
    store = await opened(url)
    await store.put(NAME, body.path, body.sha256)
    assert "Credential=from-the-file/" in server.requests[1].headers["Authorization"]


async def test_an_unusable_aws_configuration_is_explained(opened: Opening, aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="must be https://host"):  # fails before the first request
        await opened("no address")
    aws.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody"):
        await opened(None)


async def test_a_missing_bucket_is_explained_with_a_remedy(
    opened: Opening, make_bucket: MakeBucket, swift: S3Server, body: Body
) -> None:
    await make_bucket(swift)
    store = await opened(swift.url)
    message = await refused(store, body)
    assert "NoSuchBucket (404)" in message
    assert "Create the bucket" in message
    with pytest.raises(StoreError, match="NoSuchBucket") as caught:
        await read(store, NAME)
    assert not isinstance(caught.value, ObjectMissing)


async def test_a_wrong_key_is_explained_with_a_remedy(
    opened: Opening, aws: pytest.MonkeyPatch, swift: S3Server, body: Body
) -> None:
    aws.setenv("AWS_ACCESS_KEY_ID", swift.key)
    message = await refused(await opened(swift.url), body)
    assert "SignatureDoesNotMatch (403)" in message
    assert "Check the credentials" in message


async def test_a_real_store_refuses_bytes_that_changed_in_transit(
    make_bucket: MakeBucket, swift: S3Server, body: Body
) -> None:
    settings = await make_bucket(swift)
    async with open_store(str(settings.url), settings) as store:
        with pytest.raises(StoreError, match=r"BadDigest \(400\)"):
            await store.put(NAME, body.path, hashlib.sha256(b"").digest())


@pytest.mark.parametrize(
    ("addressing", "endpoint", "address"),
    [
        ("auto", None, "https://bucket.s3.amazonaws.com/nexhb/x"),
        ("auto", "https://s3.example", "https://s3.example/bucket/nexhb/x"),
        ("path", None, "https://s3.amazonaws.com/bucket/nexhb/x"),
        ("virtual", "https://s3.example", "https://bucket.s3.example/nexhb/x"),
    ],
)
async def test_the_bucket_is_addressed_as_configured(
    opened: Opening, addressing: str, endpoint: str | None, address: str
) -> None:
    store: Any = await opened(endpoint, addressing=addressing)
    url = await store.client.generate_presigned_url("get_object", {"Bucket": store.bucket, "Key": "nexhb/x"})
    assert url.partition("?")[0] == address


# ---- lists --------------------------------------------------------------------------------------------------------


def page_of(*keys: str, following: str = "") -> web.Response:
    """Return a page of a listing."""
    contents = "".join(f"<Contents><Key>nexhb/{key}</Key><Size>1</Size></Contents>" for key in keys)
    after = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
    text = (
        f"<ListBucketResult><IsTruncated>{str(bool(after)).lower()}</IsTruncated>{contents}{after}</ListBucketResult>"
    )
    return web.Response(text=text, content_type="application/xml")


async def test_a_store_that_repeats_its_listing_is_not_followed(fake: tuple[Fake, str], opened: Opening) -> None:
    """Some stores ignore the continuation token of a listing and return the same token again. Formerly, such a listing
    never ended."""
    server, url = fake
    server.handlers["GET"] = lambda _request: _soon(page_of("a", "b", following="again"))
    names = [name async for name in listing(await opened(url)).names(1_000)]
    assert names == ["a", "b", "a", "b"]
    assert len(server.requests) == 2


async def test_a_listing_is_read_up_to_the_given_number(fake: tuple[Fake, str], opened: Opening) -> None:
    """The limit holds even if the store returns more names than requested."""
    server, url = fake
    server.handlers["GET"] = each(
        lambda _: page_of("a", "b", "c", following="1"), lambda _: page_of("d", "e", "f", following="2")
    )
    store = listing(await opened(url))
    assert [name async for name in store.names(2)] == ["a", "b"]
    assert [request.query["max-keys"] for request in server.requests] == ["2"]
    assert [name async for name in store.names(4)] == ["d", "e", "f", "d"]
    assert [request.query["max-keys"] for request in server.requests[1:]] == ["4", "1"]


async def test_after_a_lost_response_no_more_is_read_than_was_put(
    fake: tuple[Fake, str], opened: Opening, body: Body
) -> None:
    """The object that exists in the store is not the one that was put, and is much larger."""
    server, url = fake
    sent: list[int] = []

    async def huge(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(100 * CHUNK)})
        await response.prepare(request)
        with suppress(ConnectionError):
            for number in range(100):
                await response.write(bytes(CHUNK))
                sent.append(number)
        return response

    server.handlers = {
        "HEAD": each(lambda _: web.Response(status=404)),
        "PUT": each(lambda _: error(500, "InternalError"), lambda _: error(412, "PreconditionFailed")),
        "GET": huge,
    }
    with pytest.raises(ObjectExists):
        await (await opened(url)).put(NAME, body.path, body.sha256)
    assert len(sent) < 50


async def _soon(response: web.Response) -> web.StreamResponse:
    return response


def listing(store: Store) -> Bucket:
    """Return the store, with the type of a store that can list its objects."""
    assert isinstance(store, Bucket)
    return store
