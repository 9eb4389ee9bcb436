"""A folder as a Store. All of its work is done in threads: a disk may be slow, or hang."""

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

from nexhb.archive.names import below, checked
from nexhb.archive.store import CHUNK
from nexhb.errors import ObjectExists, ObjectMissing, StoreError

T = TypeVar("T")

# Where PostgreSQL commits to the same disk meanwhile, one fsync of 256 MiB held up a commit for 43 to 84 ms; an fsync
# every 8 MiB for 14 to 21 ms, in the same time altogether.
SYNC_CHUNKS = 8

_REASONS = {
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file system takes no file of this size",
    errno.EACCES: "permission is missing",
    errno.EPERM: "it is not permitted, or the file system knows no hard links",
    errno.ENOTDIR: "there is a file where a folder should be",
    errno.EISDIR: "there is a folder where a file should be",
    errno.ENOENT: "it is not there",
}


@dataclass(frozen=True)
class FolderStore:
    """A Store in `folder` (made, 0700, at the first put). Each operation takes `timeout_s` at most."""

    folder: Path
    _: KW_ONLY
    timeout_s: float

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """See Store. A put that is given up leaves no object behind, unless its last step was under way."""
        put = _Put(self.folder, self._path(name), body, sha256, overwrite, stale_s=self.timeout_s)
        try:
            await self._in_time("put", put.target, self._deadline(), put.run)
        finally:
            put.given_up.set()

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """See Store. The time spent between the chunks counts too."""
        path = self._path(name)
        deadline = self._deadline()
        reading = _Get(path)
        try:
            while chunk := await self._in_time("get", path, deadline, reading.read):
                yield chunk
        finally:
            # Not waited for: where a read hangs, closing waits for it.
            asyncio.get_running_loop().run_in_executor(None, reading.close)

    async def names(self, most: int) -> AsyncGenerator[str, None]:
        """See Store. A folder that is not there has none."""
        for name in await self._in_time("list", self.folder, self._deadline(), lambda: _names(self.folder, most)):
            yield name

    def url(self, name: str) -> str:
        """See Store."""
        return f"file://{self._path(name)}"

    def name_of(self, url: str) -> str:
        """See Store."""
        return below(f"file://{self.folder / '_'}".removesuffix("_"), url)

    def _path(self, name: str) -> Path:
        return self.folder / checked(name)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_s

    async def _in_time(self, operation: str, path: Path, deadline: float, work: Callable[[], T]) -> T:
        """What `work` returns in a thread. Raises StoreError for its OSError, and at `deadline` (loop's clock)."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await asyncio.to_thread(work)
        except OSError as error:  # a TimeoutError is one
            if limit.expired():
                raise StoreError(f"{operation} {path} took longer than {self.timeout_s:g} s.") from error
            raise _said(operation, path, error) from error


def _said(operation: str, path: Path, error: OSError) -> StoreError:
    if operation == "get" and isinstance(error, FileNotFoundError):
        return ObjectMissing(f"There is no file {path}.")
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    # The error names the file at fault where a call took a name: the body, say, or a folder on the way.
    where = f"{error.filename}: " if error.filename and str(error.filename) != str(path) else ""
    return StoreError(f"{operation} {path}: {where}{reason}.")


def _names(root: Path, most: int) -> list[str]:
    found: list[str] = []
    folders = [""]
    while folders and len(found) < most:
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
                    found.append(name)
                elif not folder:  # an object lies in a folder of the store, no deeper
                    folders.append(f"{name}/")
                if len(found) == most:
                    break
    return found


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Get:
    """A file that its first read opens, in a thread that nobody can cancel: whoever gives up before that closes it all
    the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._closed = False
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """The next chunk; empty at the end. Raises OSError."""
        with self._lock:
            if self._closed:
                return b""
            if self._file is None:
                self._file = _open(self._path)
            return self._file.read(CHUNK)

    def close(self) -> None:
        """Wait for a read under way, then close."""
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
        # What is read back is what the disk has, not what the page cache remembers of the put.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


class _Put:
    """One put, in a thread; `given_up` ends it before its next step."""

    def __init__(self, root: Path, target: Path, body: Path, sha256: bytes, overwrite: bool, *, stale_s: float) -> None:
        self.root = root
        self.target = target
        self.body = body
        self.sha256 = sha256
        self.overwrite = overwrite
        self.stale_s = stale_s
        self.given_up = threading.Event()

    def run(self) -> None:
        """Raises ObjectExists, StoreError, OSError."""
        if not self.overwrite and os.path.lexists(self.target):
            raise ObjectExists(f"There is a file {self.target}.")
        made = self._make_folders()
        self._remove_leftovers()
        partial = self.target.with_name(f".{self.target.name}.{secrets.token_hex(8)}.partial")
        try:
            self._copy(partial)
            self._publish(partial)
        finally:
            with suppress(OSError):  # a leftover does no harm
                partial.unlink()
        self._sync_folders(made)

    def _make_folders(self) -> Path:
        """Make what is missing above the target; the uppermost folder whose entries may be new."""
        missing = [folder for folder in self.target.parents if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # another put's
                continue
            except NotADirectoryError as error:  # it names the folder, not the file that is in its way
                error.filename = next(str(above) for above in reversed(folder.parents) if not above.is_dir())
                raise
        return missing[-1].parent if missing else self.target.parent

    def _remove_leftovers(self) -> None:
        """What killed processes left of this object. One that still writes touched its file within `stale_s`; were
        it taken from it all the same, its link would fail."""
        oldest = time.time() - self.stale_s
        for leftover in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.partial"):
            with suppress(FileNotFoundError):
                if leftover.stat().st_mtime < oldest:
                    leftover.unlink()

    def _copy(self, partial: Path) -> None:
        digest = hashlib.sha256()
        with self.body.open("rb") as source, _create(partial) as copy:
            for number, chunk in enumerate(iter(lambda: source.read(CHUNK), b""), 1):
                self._go_on()
                digest.update(chunk)
                copy.write(chunk)
                if number % SYNC_CHUNKS == 0:
                    _sync(copy)
            _sync(copy)
        if digest.digest() != self.sha256:
            raise StoreError(f"put {self.target}: {self.body} has not the SHA-256 {self.sha256.hex()}.")

    def _publish(self, partial: Path) -> None:
        self._go_on()
        if self.overwrite:
            partial.replace(self.target)
            return
        try:
            self.target.hardlink_to(partial)
        except FileExistsError:
            raise ObjectExists(f"There is a file {self.target}.") from None

    def _sync_folders(self, made: Path) -> None:
        """From the target's folder up to the store's own, or to the uppermost whose entries are new: a put that was
        killed may have made folders without this step."""
        uppermost = min(self.root, made, key=lambda folder: len(folder.parts))
        for folder in self.target.parents:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            if folder == uppermost:
                return

    def _go_on(self) -> None:
        if self.given_up.is_set():
            raise StoreError(f"put {self.target} was given up.")
