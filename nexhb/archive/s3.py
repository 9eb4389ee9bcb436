"""A Store in an S3-compatible bucket. Each object is one PutObject, streamed from its file."""

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
from nexhb.archive.names import checked_name, name_below
from nexhb.archive.store import CHUNK, ListedStore
from nexhb.config import ArchiveSettings
from nexhb.errors import ObjectExists, StoreError

_log = log.get("archive")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
ATTEMPTS = 3
ALL_OBJECTS = "*"  # stands for "all objects" in messages

# Headers of a put that some stores (Backblaze B2 and others) reject with 400 or 501. Without the checksum, only
# reading the object back shows that its bytes are right. Without the condition, only the HEAD request before the put
# prevents replacing an object, and a put of the same name between the two requests goes undetected.
CHECKSUM = "x-amz-checksum-sha256"
CONDITION = "If-None-Match"


@asynccontextmanager
async def open_bucket(url: str, settings: ArchiveSettings) -> AsyncIterator[ListedStore]:
    """Open the Store at `s3://bucket/prefix`. Credentials are found as by AWS tools: environment, files, role.

    Raises StoreError if the AWS configuration is unusable. The bucket is not contacted before the first put or get.
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
    """Create an AWS session and load the data that a client needs. Loading would block the event loop for 0.3 s."""
    import aioboto3.s3.inject  # noqa: PLC0415 - it takes half a second, so it runs in this thread
    from aiobotocore.session import get_session  # noqa: PLC0415

    session = get_session()
    loader = session.get_component("data_loader")
    for model in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", model)
    for data in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(data)
    return aioboto3.Session(botocore_session=session)


def _client_config(settings: ArchiveSettings) -> Any:
    from aiobotocore.config import AioConfig  # noqa: PLC0415 - see _session

    return AioConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=min(READ_TIMEOUT_S, settings.timeout_seconds),
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        # Stores other than AWS reject the checksums that botocore adds by default (boto3 #4398).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "addressing_style": settings.addressing,
            # The signature covers x-amz-checksum-sha256 instead of the body: without TLS, botocore would hash the body
            # again, on the event loop (0.2 s for 256 MiB).
            "payload_signing_enabled": False,
        },
    )


@dataclass(frozen=True)
class Bucket:
    """A Store in `bucket`, below `prefix` (empty, or ending with `/`). Each operation takes at most `timeout_s`."""

    client: Any
    bucket: str
    prefix: str
    timeout_s: float
    unsupported: set[str] = field(default_factory=set)  # headers that this store has rejected

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store an object (see Store)."""
        async with self._in_time("put", name, self._deadline()):
            with _opened(body) as file:
                if overwrite:
                    await self._send(name, file, sha256, {CHECKSUM})
                else:
                    await self._send_new(name, file, sha256)

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes (see Store). The time limit includes the caller's time between chunks."""
        deadline = self._deadline()
        async with AsyncExitStack() as stack:
            async with self._in_time("get", name, deadline):
                response = await self.client.get_object(Bucket=self.bucket, Key=self._key(name))
                body = response["Body"]
                await stack.enter_async_context(body)
                if response.get("ContentLength") is None:
                    raise StoreError(f"get {self.url(name)}: the store's response lacks its length.")
            while True:
                async with self._in_time("get", name, deadline):
                    chunk = await _chunk(body)
                if not chunk:
                    return
                yield chunk

    async def names(self, max_names: int) -> AsyncGenerator[str, None]:
        """Yield the names of the objects (see Store), in pages of 1,000."""
        left, deadline, position = max_names, self._deadline(), dict[str, str]()
        while left > 0:
            async with self._in_time("list", ALL_OBJECTS, deadline):
                page = await self.client.list_objects_v2(
                    Bucket=self.bucket, Prefix=self.prefix, MaxKeys=min(left, 1_000), **position
                )
            for item in page.get("Contents", [])[:left]:
                left -= 1
                yield item["Key"].removeprefix(self.prefix)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token or position.get("ContinuationToken") == token:
                return
            position = {"ContinuationToken": token}

    def url(self, name: str) -> str:
        """Return the object's s3:// URL."""
        return f"s3://{self.bucket}/{self._key(name)}"

    def name_of(self, url: str) -> str:
        """Return the name of the object at `url`. Raises StoreError if it is not in this bucket and prefix."""
        return name_below(f"s3://{self.bucket}/{self.prefix}", url)

    def _key(self, name: str) -> str:
        return self.prefix + checked_name(name)

    async def _send_new(self, name: str, file: _File, sha256: bytes) -> None:
        # HEAD first: a store may not support If-None-Match, and may ignore it instead of rejecting it (400, 501).
        exists = await self._exists(name)
        if exists:
            raise ObjectExists(f"The object {self.url(name)} already exists.")
        required = frozenset() if exists is False else frozenset({CONDITION})
        try:
            await self._send(name, file, sha256, {CHECKSUM, CONDITION}, required)
        except ClientError as error:
            # An earlier attempt of this put, whose response was lost, may have stored the object.
            if not s3_errors.is_precondition_failure(error):
                raise
            if not (s3_errors.was_retried(error) and await self._holds(name, sha256, file.size)):
                raise ObjectExists(f"The object {self.url(name)} already exists.") from error

    async def _send(
        self, name: str, file: _File, sha256: bytes, headers: Set[str], required: Set[str] = frozenset()
    ) -> None:
        """Put the object with `headers`. Omit headers that the store rejects, but never those in `required`.

        If the store rejects every attempt, including the attempt without optional headers, raise the first error.
        """
        first: ClientError | None = None
        candidates = frozenset(headers) - (self.unsupported - required)
        for omitted in _omissions(candidates - required):
            try:
                await self._put_object(name, file, sha256, candidates - omitted)
            except ClientError as error:
                if not s3_errors.is_header_unsupported(error):
                    raise
                first = first or error
            else:
                self._remember(omitted)
                return
        assert first is not None  # noqa: S101 - the first attempt omits nothing
        raise first

    def _remember(self, omitted: Set[str]) -> None:
        for header in sorted(omitted):
            _log.info("archive.header_unknown_to_store", header=header, bucket=self.bucket)
        self.unsupported.update(omitted)

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

    async def _exists(self, name: str) -> bool | None:
        """Return whether the object exists; None if HEAD failed without saying why (the put will say why)."""
        try:
            await self.client.head_object(Bucket=self.bucket, Key=self._key(name))
        except ClientError as error:
            return False if s3_errors.status(error) == 404 else None
        return True

    async def _holds(self, name: str, sha256: bytes, max_bytes: int) -> bool:
        digest, size = hashlib.sha256(), 0
        async with aclosing(self.get(name)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    return False
                await asyncio.to_thread(digest.update, chunk)
        return digest.digest() == sha256

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_s

    @asynccontextmanager
    async def _in_time(self, operation: str, name: str, deadline: float) -> AsyncIterator[None]:
        """Translate the block's errors to StoreError; cancel the block at `deadline` (by the event loop's clock)."""
        operation_url = f"{operation} {self.url(name)}"
        endpoint = urlsplit(self.client.meta.endpoint_url).netloc.rpartition("@")[2]
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                yield
        except (BotoCoreError, ClientError, TransportError, OSError) as error:  # a TimeoutError is an OSError
            if limit.expired():
                raise StoreError(f"{operation_url} took longer than {self.timeout_s:g} s.") from error
            raise s3_errors.store_error(operation_url, endpoint, error) from error


def _omissions(headers: Set[str]) -> list[frozenset[str]]:
    """Return the headers that each attempt omits: none, then only CONDITION, then only CHECKSUM, then both headers."""
    one_each = [frozenset({header}) for header in (CONDITION, CHECKSUM) if header in headers]
    return [frozenset(), *one_each, *([frozenset(headers)] if len(one_each) > 1 else [])]


async def _chunk(body: Any) -> bytes:
    """Return the next CHUNK bytes of a response's body; fewer at the end of the body, and none after the end."""
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
        os.close(fd)  # a read that is still running in a thread may fail now, but nobody uses its result


@dataclass(frozen=True)
class _File:
    """The body of a put, for aiobotocore: each attempt iterates over the file from its start, in chunks that a thread
    reads.

    The body is not a plain file, because aiohttp would send the file's name and read only 64 KiB at a time.
    """

    fd: int
    size: int

    def read(self) -> bytes:
        """Mark this object as a body for botocore, which never calls this method."""
        raise NotImplementedError

    def seek(self, offset: int) -> None:
        """Do nothing: botocore calls this before another attempt, which iterates from the start anyway."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = 0
        while chunk := await asyncio.to_thread(os.pread, self.fd, CHUNK, offset):
            offset += len(chunk)
            yield chunk
