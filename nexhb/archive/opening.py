"""Open an archive store by its URL."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

from nexhb.archive.names import checked_name
from nexhb.archive.store import ListedStore, Store
from nexhb.config import ArchiveSettings
from nexhb.errors import StoreError


@asynccontextmanager
async def open_store(url: str, settings: ArchiveSettings) -> AsyncIterator[ListedStore]:
    """Open the store at `url` (Settings.archive_url). It can also read archives recorded in earlier stores.

    Nothing is accessed before the first put or get. If the store cannot be opened, only its operations raise the error,
    so that callers which do not use the store still work.
    """
    async with AsyncExitStack() as stack:
        store: ListedStore
        try:
            store = await stack.enter_async_context(_open(url, settings))
        except StoreError as error:
            store = _UnavailableStore(error)
        yield _StoreWithFormer(store, stack, settings)


@asynccontextmanager
async def _open(url: str, settings: ArchiveSettings) -> AsyncIterator[ListedStore]:
    if url.startswith("file://"):
        from nexhb.archive.file import FolderStore  # noqa: PLC0415 - load only the kind that is used

        yield FolderStore(Path(url.removeprefix("file://")), timeout_s=settings.timeout_seconds)
        return
    from nexhb.archive.s3 import open_bucket  # noqa: PLC0415 - importing it takes half a second and 40 MB

    async with open_bucket(url, settings) as store:
        yield store


class _UnavailableStore:
    """A Store that could not be opened. Every operation raises the error that opening raised."""

    def __init__(self, error: StoreError) -> None:
        self._error = error

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Raise the error of opening the store."""
        raise self._error

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Raise the error of opening the store."""
        if name:
            raise self._error
        yield b""

    async def names(self, max_names: int) -> AsyncGenerator[str, None]:
        """Raise the error of opening the store."""
        if max_names:
            raise self._error
        yield ""

    def url(self, name: str) -> str:
        """Raise the error of opening the store."""
        raise self._error

    def name_of(self, url: str) -> str:
        """Raise the error of opening the store."""
        raise self._error


class _StoreWithFormer:
    """The current store and, read-only, the stores that archive.url named earlier. The name of an object in an earlier
    store is its whole URL."""

    def __init__(self, store: ListedStore, stack: AsyncExitStack, settings: ArchiveSettings) -> None:
        self._store, self._stack, self._settings = store, stack, settings
        self._former: dict[str, ListedStore] = {}
        self.put, self.url, self.names = store.put, store.url, store.names

    def name_of(self, url: str) -> str:
        """Return the name in the current store, or else the URL. Raises StoreError if `url` is no archive's URL."""
        try:
            return self._store.name_of(url)
        except StoreError:
            root, folder, last = ["", "", *url.rsplit("/", 2)][-3:]
            if not root.startswith(("file:///", "s3://")):
                raise
            checked_name(f"{folder}/{last}")
            return url

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes, from the current or an earlier store (see Store)."""
        store: Store = self._store
        if "://" in name:
            root, folder, last = name.rsplit("/", 2)
            if root not in self._former:
                self._former[root] = await self._stack.enter_async_context(_open(root, self._settings))
            store, name = self._former[root], f"{folder}/{last}"
        async with aclosing(store.get(name)) as chunks:
            async for chunk in chunks:
                yield chunk
