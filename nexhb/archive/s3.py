"""An S3-compatible bucket as a Store. An object is one PutObject, streamed from its file."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Set
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError as TransportError
from botocore.exceptions import BotoCoreError, ClientError

from nexhb import log
from nexhb.archive import s3_errors
from nexhb.archive.names import below, checked
from nexhb.archive.store import CHUNK, ListedStore
from nexhb.config import Archive
from nexhb.errors import ObjectExists, StoreError

_log = log.get("archive")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
ATTEMPTS = 3
LISTED = "*"  # how a message names all of the objects

# Headers of a put that not every store knows; one that does not answers 400 or 501 (Backblaze B2 and others). Without
# the checksum the read-back is what proves the bytes; without the condition, the question before the put is what keeps
# an object from being replaced, and somebody who puts the same name within those milliseconds is not noticed.
CHECKSUM = "x-amz-checksum-sha256"
CONDITION = "If-None-Match"


@asynccontextmanager
async def open_bucket(url: str, settings: Archive) -> AsyncIterator[ListedStore]:
    """The Store at `s3://bucket/prefix`, open for the block. Credentials come the AWS way: environment, files, role.

    Raises StoreError where the AWS configuration is not usable; the bucket is not asked before the first put or get.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                session = await asyncio.to_thread(_session)
                client = await stack.enter_async_context(
                    session.client(
                        "s3",
                        endpoint_url=settings.endpoint_url,
                        region_name=settings.region,
                        config=_client_config(settings),
                    )
                )
        except (BotoCoreError, ClientError, TransportError, ValueError, OSError) as error:
            raise s3_errors.store_error(f"open {url}", settings.endpoint_url or "AWS", error) from error
        yield Bucket(client, bucket, f"{prefix.strip('/')}/".lstrip("/"), settings.timeout_seconds)


def _session() -> Any:
    """An AWS session that has read what a client is made of: on the event loop that held up heartbeats for 0.3 s."""
    import aioboto3.s3.inject  # noqa: PLC0415 - see above
    from aiobotocore.session import get_session  # noqa: PLC0415

    session = get_session()
    loader = session.get_component("data_loader")
    for model in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", model)
    for data in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(data)
    return aioboto3.Session(botocore_session=session)


def _client_config(settings: Archive) -> Any:
    from aiobotocore.config import AioConfig  # noqa: PLC0415 - see _session

    return AioConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=min(READ_TIMEOUT_S, settings.timeout_seconds),
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        # Checksums of botocore's own choosing are refused by stores that are not AWS's (boto3 #4398).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "addressing_style": settings.addressing,
            # The signature covers x-amz-checksum-sha256 instead: without TLS, botocore would hash the body once more,
            # on the event loop (0.2 s for 256 MiB).
            "payload_signing_enabled": False,
        },
    )


@dataclass(frozen=True)
class Bucket:
    """A Store in `bucket`, below `prefix` ("" or with its closing `/`). Each operation takes `timeout_s` at most."""

    client: Any
    bucket: str
    prefix: str
    timeout_s: float
    unknown: set[str] = field(default_factory=set)  # headers that this store turned out not to know

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """See Store."""
        async with self._in_time("put", name, self._deadline()):
            with _opened(body) as file:
                if overwrite:
                    await self._send(name, file, sha256, {CHECKSUM})
                else:
                    await self._send_new(name, file, sha256)

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """See Store. The time spent between the chunks counts too."""
        deadline = self._deadline()
        async with AsyncExitStack() as stack:
            async with self._in_time("get", name, deadline):
                answer = await self.client.get_object(Bucket=self.bucket, Key=self._key(name))
                body = answer["Body"]
                await stack.enter_async_context(body)
                if answer.get("ContentLength") is None:
                    raise StoreError(f"get {self.url(name)}: the store does not say how long it is.")
            while True:
                async with self._in_time("get", name, deadline):
                    chunk = await _chunk(body)
                if not chunk:
                    return
                yield chunk

    async def names(self, most: int) -> AsyncGenerator[str, None]:
        """See Store. A thousand at a time."""
        left, deadline, where = most, self._deadline(), dict[str, str]()
        while left > 0:
            async with self._in_time("list", LISTED, deadline):
                page = await self.client.list_objects_v2(
                    Bucket=self.bucket, Prefix=self.prefix, MaxKeys=min(left, 1_000), **where
                )
            for one in page.get("Contents", [])[:left]:
                left -= 1
                yield one["Key"].removeprefix(self.prefix)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token or where.get("ContinuationToken") == token:
                return
            where = {"ContinuationToken": token}

    def url(self, name: str) -> str:
        """See Store."""
        return f"s3://{self.bucket}/{self._key(name)}"

    def name_of(self, url: str) -> str:
        """See Store."""
        return below(f"s3://{self.bucket}/{self.prefix}", url)

    def _key(self, name: str) -> str:
        return self.prefix + checked(name)

    async def _send_new(self, name: str, file: _File, sha256: bytes) -> None:
        # Asked first: a store may not know If-None-Match, and say so (400, 501) or not.
        there = await self._is_there(name)
        if there:
            raise ObjectExists(f"There is an object {self.url(name)}.")
        needs = frozenset() if there is False else frozenset({CONDITION})
        try:
            await self._send(name, file, sha256, {CHECKSUM, CONDITION}, needs)
        except ClientError as error:
            # It may be this put's own: of an attempt that was carried out, and whose answer was lost.
            if not s3_errors.exists(error):
                raise
            if not (s3_errors.retried(error) and await self._holds(name, sha256, file.size)):
                raise ObjectExists(f"There is an object {self.url(name)}.") from error

    async def _send(
        self, name: str, file: _File, sha256: bytes, headers: Set[str], needs: Set[str] = frozenset()
    ) -> None:
        """Put with `headers`, less those that the store turns out not to know; never without those in `needs`.

        Raises what the store answered to the first attempt where leaving headers out does not help.
        """
        first: ClientError | None = None
        wanted = frozenset(headers) - (self.unknown - needs)
        for left_out in _left_out(wanted - needs):
            try:
                await self._put_object(name, file, sha256, wanted - left_out)
            except ClientError as error:
                if not s3_errors.header_unknown(error):
                    raise
                first = first or error
            else:
                self._remember(left_out)
                return
        assert first is not None  # noqa: S101 - the first attempt leaves nothing out
        raise first

    def _remember(self, left_out: Set[str]) -> None:
        for header in sorted(left_out):
            _log.info("archive.header_unknown_to_store", header=header, bucket=self.bucket)
        self.unknown.update(left_out)

    async def _put_object(self, name: str, file: _File, sha256: bytes, headers: Set[str]) -> None:
        optional: dict[str, str] = {}
        if CHECKSUM in headers:
            optional["ChecksumSHA256"] = base64.b64encode(sha256).decode()
        if CONDITION in headers:
            optional["IfNoneMatch"] = "*"
        await self.client.put_object(
            Bucket=self.bucket,
            Key=self._key(name),
            Body=file,
            ContentLength=file.size,
            ContentType="application/octet-stream",
            **optional,
        )

    async def _is_there(self, name: str) -> bool | None:
        """None where the store does not say: an answer to HEAD has no words, the put's answer will have them."""
        try:
            await self.client.head_object(Bucket=self.bucket, Key=self._key(name))
        except ClientError as error:
            return False if s3_errors.status(error) == 404 else None
        return True

    async def _holds(self, name: str, sha256: bytes, most_bytes: int) -> bool:
        digest, size = hashlib.sha256(), 0
        async with aclosing(self.get(name)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > most_bytes:
                    return False
                await asyncio.to_thread(digest.update, chunk)
        return digest.digest() == sha256

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_s

    @asynccontextmanager
    async def _in_time(self, operation: str, name: str, deadline: float) -> AsyncIterator[None]:
        """What goes wrong in the block, or a deadline (of the loop's clock) gone by, is a StoreError."""
        what = f"{operation} {self.url(name)}"
        endpoint = urlsplit(self.client.meta.endpoint_url).netloc.rpartition("@")[2]
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                yield
        except (BotoCoreError, ClientError, TransportError, OSError) as error:  # a TimeoutError is an OSError
            if limit.expired():
                raise StoreError(f"{what} took longer than {self.timeout_s:g} s.") from error
            raise s3_errors.store_error(what, endpoint, error) from error


def _left_out(headers: Set[str]) -> list[frozenset[str]]:
    """What to leave out, attempt by attempt: nothing, then one header, then the other, then both."""
    one_each = [frozenset({header}) for header in (CONDITION, CHECKSUM) if header in headers]
    return [frozenset(), *one_each, *([frozenset(headers)] if len(one_each) > 1 else [])]


async def _chunk(body: Any) -> bytes:
    """The next CHUNK of a response's body; shorter at its end, empty after it."""
    chunk = bytearray()
    while len(chunk) < CHUNK and (piece := await body.read(CHUNK - len(chunk))):
        chunk += piece
    return bytes(chunk)


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield _File(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)  # what a read under way in a thread still brings, nobody takes


@dataclass(frozen=True)
class _File:
    """A body as aiobotocore takes one: each attempt iterates over it anew, from its start, in chunks read in a thread.

    Not a plain file: aiohttp sends one's name along, and reads it in 64 KiB.
    """

    fd: int
    size: int

    def read(self) -> bytes:
        """What tells botocore that this is a body; nobody calls it."""
        raise NotImplementedError

    def seek(self, offset: int) -> None:
        """What botocore does before another attempt, which starts anew anyway."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = 0
        while chunk := await asyncio.to_thread(os.pread, self.fd, CHUNK, offset):
            offset += len(chunk)
            yield chunk
