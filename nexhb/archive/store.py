"""Where archives lie: one small interface over folders and S3-compatible stores."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Protocol

from nexhb.archive.names import checked
from nexhb.config import Archive
from nexhb.errors import StoreError

CHUNK = 1 << 20  # bytes handed over at a time


class Store(Protocol):
    """Objects by name (`/` separates folders). Nothing in it is ever deleted by nexhb."""

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store the file `body`, whose SHA-256 digest is `sha256`; durable once this returns.

        Raises ObjectExists where there is one of that name already (unless `overwrite`), StoreError for what else
        goes wrong, within the store's time limit.
        """

    def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """The object's bytes as they lie in the store, in chunks of about CHUNK.

        Raises ObjectMissing where there is none, StoreError for what else goes wrong, within the time limit.
        """

    def url(self, name: str) -> str:
        """What to write down: file:///… or s3://bucket/…"""

    def name_of(self, url: str) -> str:
        """The name that `url` (as written down) has in this store. Raises StoreError where it lies elsewhere."""


class ListedStore(Store, Protocol):
    """A Store that says what is in it."""

    def names(self, most: int) -> AsyncGenerator[str, None]:
        """The names of the objects that are there, `most` of them at most; of hidden files none. Raises StoreError."""


@asynccontextmanager
async def open_store(url: str, settings: Archive) -> AsyncIterator[ListedStore]:
    """The store at `url` (Settings.archive_url), open for the block; it reads archives that were written down elsewhere
    too. Touches nothing before the first put or get; one that cannot be opened says so then: what needs no store goes
    on without it."""
    async with AsyncExitStack() as stack:
        store: ListedStore
        try:
            store = await stack.enter_async_context(_open(url, settings))
        except StoreError as error:
            store = _Closed(error)
        yield _Everywhere(store, stack, settings)


@asynccontextmanager
async def _open(url: str, settings: Archive) -> AsyncIterator[ListedStore]:
    if url.startswith("file://"):
        from nexhb.archive.file import FolderStore  # noqa: PLC0415 - only the one that is used is loaded

        yield FolderStore(Path(url.removeprefix("file://")), timeout_s=settings.timeout_seconds)
        return
    from nexhb.archive.s3 import open_bucket  # noqa: PLC0415 - its library takes half a second and 40 MB

    async with open_bucket(url, settings) as store:
        yield store


class _Closed:
    """A Store that could not be opened."""

    def __init__(self, why: StoreError) -> None:
        self._why = why

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Raises why."""
        raise self._why

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Raises why."""
        if name:
            raise self._why
        yield b""

    async def names(self, most: int) -> AsyncGenerator[str, None]:
        """Raises why."""
        if most:
            raise self._why
        yield ""

    def url(self, name: str) -> str:
        """Raises why."""
        raise self._why

    def name_of(self, url: str) -> str:
        """Raises why."""
        raise self._why


class _Everywhere:
    """The store in use; and, to read only, those that were in use before archive.url was changed. A name there is the
    whole url."""

    def __init__(self, store: ListedStore, stack: AsyncExitStack, settings: Archive) -> None:
        self._store, self._stack, self._settings = store, stack, settings
        self._former: dict[str, ListedStore] = {}
        self.put, self.url, self.names = store.put, store.url, store.names

    def name_of(self, url: str) -> str:
        """The name in the store in use, else the url itself. Raises StoreError for what is no archive's address."""
        try:
            return self._store.name_of(url)
        except StoreError:
            root, folder, last = ["", "", *url.rsplit("/", 2)][-3:]
            if not root.startswith(("file:///", "s3://")):
                raise
            checked(f"{folder}/{last}")
            return url

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """See Store."""
        store: Store = self._store
        if "://" in name:
            root, folder, last = name.rsplit("/", 2)
            if root not in self._former:
                self._former[root] = await self._stack.enter_async_context(_open(root, self._settings))
            store, name = self._former[root], f"{folder}/{last}"
        async with aclosing(store.get(name)) as chunks:
            async for chunk in chunks:
                yield chunk
