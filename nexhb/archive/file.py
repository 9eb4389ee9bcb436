"""A Store in a folder. All of its I/O runs in threads, because a disk may be slow or hang."""

from __future__ import annotations

import asyncio
import errno
import glob
import hashlib
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from nexhb.archive.names import checked_name, name_below
from nexhb.archive.store import CHUNK
from nexhb.errors import ObjectExists, ObjectMissing, StoreError

T = TypeVar("T")

# While PostgreSQL committed to the same disk, one fsync of 256 MiB delayed a commit by 43 to 84 ms. An fsync after
# every 8 MiB delayed a commit by 14 to 21 ms and took the same time in total.
SYNC_CHUNKS = 8

_REASONS = {
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large for the file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted, or the file system does not support hard links",
    errno.ENOTDIR: "a folder on the path is a file",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOENT: "it does not exist",
}


@dataclass(frozen=True)
class FolderStore:
    """A Store in `folder`, which the first put creates with mode 0700. Each operation takes at most `timeout_s`."""

    folder: Path
    _: KW_ONLY
    timeout_s: float

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store an object (see Store). A put that is cancelled or times out leaves no object, unless its last step,
        which gives the file its name, had already begun."""
        put = _Put(self.folder, self._path(name), body, sha256, overwrite, stale_s=self.timeout_s)
        try:
            await self._in_time("put", put.target, self._deadline(), put.run)
        finally:
            put.cancelled.set()

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes (see Store). The time limit includes the caller's time between chunks."""
        path = self._path(name)
        deadline = self._deadline()
        reading = _Get(path)
        try:
            while chunk := await self._in_time("get", path, deadline, reading.read):
                yield chunk
        finally:
            # If a read hangs, closing the file hangs too, so closing is not awaited.
            asyncio.get_running_loop().run_in_executor(None, reading.close)

    async def names(self, max_names: int) -> AsyncGenerator[str, None]:
        """Yield the names of the objects (see Store); no names if the folder does not exist."""
        for name in await self._in_time("list", self.folder, self._deadline(), lambda: _names(self.folder, max_names)):
            yield name

    def url(self, name: str) -> str:
        """Return the object's file:// URL."""
        return f"file://{self._path(name)}"

    def name_of(self, url: str) -> str:
        """Return the name of the object at `url`. Raises StoreError if it is not in this folder."""
        return name_below(f"file://{self.folder / '_'}".removesuffix("_"), url)

    def _path(self, name: str) -> Path:
        return self.folder / checked_name(name)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_s

    async def _in_time(self, operation: str, path: Path, deadline: float, work: Callable[[], T]) -> T:
        """Run `work` in a thread. Raises StoreError for an OSError, and at `deadline` (by the event loop's clock)."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await asyncio.to_thread(work)
        except OSError as error:  # a TimeoutError is an OSError
            if limit.expired():
                raise StoreError(f"{operation} {path} took longer than {self.timeout_s:g} s.") from error
            raise _store_error(operation, path, error) from error


def _store_error(operation: str, path: Path, error: OSError) -> StoreError:
    if operation == "get" and isinstance(error, FileNotFoundError):
        return ObjectMissing(f"There is no file {path}.")
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    # The error may name a file other than `path`, such as the body or a folder on the path.
    where = f"{error.filename}: " if error.filename and str(error.filename) != str(path) else ""
    return StoreError(f"{operation} {path}: {where}{reason}.")


def _names(root: Path, max_names: int) -> list[str]:
    names: list[str] = []
    folders = [""]
    while folders and len(names) < max_names:
        folder = folders.pop()
        try:
            entries = os.scandir(root / folder)
        except FileNotFoundError:
            continue
        with entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    names.append(name)
                elif not folder:  # objects are at most one folder below the store's folder
                    folders.append(f"{name}/")
                if len(names) == max_names:
                    break
    return names


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Get:
    """A file that is opened by its first read. The read runs in a thread, which cannot be cancelled, so `close` also
    works before and during the first read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._closed = False
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """Return the next chunk; empty at the end. Raises OSError."""
        with self._lock:
            if self._closed:
                return b""
            if self._file is None:
                self._file = _open(self._path)
            return self._file.read(CHUNK)

    def close(self) -> None:
        """Close the file once a read in progress has ended."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()


def _open(path: Path) -> BinaryIO:
    file = path.open("rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if sys.platform == "linux":
        # Verification must read the disk, not the pages that the put left in the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


class _Put:
    """One put, which runs in a thread. Setting `cancelled` ends it before its next step."""

    def __init__(self, root: Path, target: Path, body: Path, sha256: bytes, overwrite: bool, *, stale_s: float) -> None:
        self.root = root
        self.target = target
        self.body = body
        self.sha256 = sha256
        self.overwrite = overwrite
        self.stale_s = stale_s
        self.cancelled = threading.Event()

    def run(self) -> None:
        """Copy the body and give the copy its name. Raises ObjectExists, StoreError, OSError."""
        if not self.overwrite and os.path.lexists(self.target):
            raise ObjectExists(f"The file {self.target} already exists.")
        made = self._make_folders()
        self._remove_leftovers()
        partial = self.target.with_name(f".{self.target.name}.{secrets.token_hex(8)}.partial")
        try:
            self._copy(partial)
            self._publish(partial)
        finally:
            with suppress(OSError):  # a partial file that is left over is harmless
                partial.unlink()
        self._sync_folders(made)

    def _make_folders(self) -> Path:
        """Create the missing folders above the target. Return the uppermost folder that may have a new entry."""
        missing = [folder for folder in self.target.parents if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # another put has created the folder
                continue
            except NotADirectoryError as error:  # the error names the folder, not the file in its way
                error.filename = next(str(above) for above in reversed(folder.parents) if not above.is_dir())
                raise
        return missing[-1].parent if missing else self.target.parent

    def _remove_leftovers(self) -> None:
        """Delete partial files of this object that killed processes left. A process that is still writing has changed
        its file within `stale_s`; if the file were deleted nevertheless, that process's put would fail."""
        oldest = time.time() - self.stale_s
        for leftover in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.partial"):
            with suppress(FileNotFoundError):
                if leftover.stat().st_mtime < oldest:
                    leftover.unlink()

    def _copy(self, partial: Path) -> None:
        digest = hashlib.sha256()
        with self.body.open("rb") as source, _create(partial) as copy:
            for number, chunk in enumerate(iter(lambda: source.read(CHUNK), b""), 1):
                self._raise_if_cancelled()
                digest.update(chunk)
                copy.write(chunk)
                if number % SYNC_CHUNKS == 0:
                    _sync(copy)
            _sync(copy)
        if digest.digest() != self.sha256:
            raise StoreError(f"put {self.target}: the SHA-256 of {self.body} is not {self.sha256.hex()}.")

    def _publish(self, partial: Path) -> None:
        self._raise_if_cancelled()
        if self.overwrite:
            partial.replace(self.target)
            return
        try:
            self.target.hardlink_to(partial)
        except FileExistsError:
            raise ObjectExists(f"The file {self.target} already exists.") from None

    def _sync_folders(self, made: Path) -> None:
        """Sync the folders from the target's folder up to the store's, or to the uppermost folder with a new entry.

        Folders that this put did not create are synced too: a put that was killed before this step may have made them.
        """
        uppermost = min(self.root, made, key=lambda folder: len(folder.parts))
        for folder in self.target.parents:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            if folder == uppermost:
                return

    def _raise_if_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise StoreError(f"put {self.target} was cancelled.")
