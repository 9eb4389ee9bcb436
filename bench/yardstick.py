"""What an archive is measured by: psql, zstd and sha256sum in a pipe, over the same rows in the same order."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.stack import Stack, StackError
from nexhb import sql
from nexhb.archive import export

_Q = sql.queries("archive")
# for a machine without the program of that name
_ZSTD: Final = """
import sys, zstandard
parameters = zstandard.ZstdCompressionParameters.from_level(
    int(sys.argv[1]), window_log=int(sys.argv[2]), min_match=int(sys.argv[3])
)
zstandard.ZstdCompressor(compression_params=parameters).copy_stream(sys.stdin.buffer, sys.stdout.buffer)
"""
_SHA256: Final = """
import sys, hashlib
print(hashlib.file_digest(sys.stdin.buffer, "sha256").hexdigest())
"""


@dataclass(frozen=True, slots=True)
class Piped:
    """One run of the pipe."""

    seconds: float
    sha256: str
    programs: str


def compressed(own: Stack, table: str) -> Piped:
    """`psql \\copy | zstd | sha256sum`, with the parameters that nexhb compresses with."""
    level, window, match = export.LEVEL, export.WINDOW_LOG, export.MIN_MATCH
    words = ["-q", "-T1", f"-{level}", f"--zstd=wlog={window},mml={match}"]
    zstd, name = _program("zstd", words, _ZSTD, [f"{level}", f"{window}", f"{match}"])
    return _run([_psql(own, table), zstd, _sha256()], f"psql | {name} | sha256sum")


def plain(own: Stack, table: str) -> Piped:
    """`psql \\copy | sha256sum`: the hash that the archive's own stream must have."""
    return _run([_psql(own, table), _sha256()], "psql | sha256sum")


def _psql(own: Stack, table: str) -> list[str]:
    # one line: \copy knows no other
    select = " ".join(export.select_table(table).split())
    copy = f"\\copy ({select}) TO STDOUT WITH (FORMAT csv, HEADER, ENCODING 'utf-8')"
    return [str(own.program("psql")), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", _Q["session"], "-c", copy, own.dsn]


def _sha256() -> list[str]:
    return _program("sha256sum", [], _SHA256, [])[0]


def _program(name: str, words: Sequence[str], instead: str, its_words: Sequence[str]) -> tuple[list[str], str]:
    """A program of this machine, or a Python that does the same; and how it is called in a result."""
    if found := shutil.which(name):
        return [found, *words], " ".join([name, *words])
    return [sys.executable, "-c", instead, *its_words], " ".join([f"python ({name})", *its_words])


def _run(commands: Sequence[Sequence[str]], programs: str) -> Piped:
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []
        for command in commands:
            source = running[-1].stdout if running else subprocess.DEVNULL
            running.append(
                stack.enter_context(subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, close_fds=True))
            )
            if running[1:]:
                # ours would keep the one before from hearing that this one has ended
                stdout = running[-2].stdout
                assert stdout is not None  # noqa: S101 - a pipe was asked for
                stdout.close()
        last = running[-1].stdout
        assert last is not None  # noqa: S101 - a pipe was asked for
        digest = last.read().decode().split()
        ended = [process.wait() for process in running]
    if any(ended) or not digest:
        raise StackError(f"{programs} ended with {ended}")
    return Piped(time.perf_counter() - began, digest[0], programs)
