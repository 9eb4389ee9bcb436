"""The interface of an archive store, which folders and S3-compatible buckets implement."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 20  # bytes read or written at a time


class Store(Protocol):
    """Objects by name (`/` separates folders). nexhb never deletes an object."""

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store the file `body`, whose SHA-256 digest is `sha256`. The object is durable once this returns.

        Raises ObjectExists if the name exists and `overwrite` is false, and StoreError for any other error, within the
        store's time limit.
        """

    def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield the object's bytes as the store has them, in chunks of about CHUNK bytes.

        Raises ObjectMissing if the name does not exist, and StoreError for any other error, within the time limit.
        """

    def url(self, name: str) -> str:
        """Return the URL that the catalog records: file:///… or s3://bucket/…"""

    def name_of(self, url: str) -> str:
        """Return the name of the object at a URL from the catalog. Raises StoreError if the URL is in another store."""


class ListedStore(Store, Protocol):
    """A Store that can list its objects."""

    def names(self, max_names: int) -> AsyncGenerator[str, None]:
        """Yield the names of the objects, at most `max_names`, without hidden files. Raises StoreError."""
