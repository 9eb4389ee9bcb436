"""Make a virtual environment that was built in one folder one of another: `relocate.py BUILT FINAL`.

A package is built below DESTDIR and lies in PREFIX on the machine where it is installed. Its programs, its
configuration and its compiled files name the place where they lie, not the one where they were built.
"""

import base64
import compileall
import csv
import hashlib
import io
import re
import shutil
import sys
from pathlib import Path

SHEBANG_MOST = 127  # bytes that every Linux reads of a program's first line
# How pip starts a Python whose path is longer, or contains a blank.
BY_SHELL = re.compile(rb"\A#!/bin/sh\n'''exec' \"?([^\"\n]*/bin/python[0-9.]*)\"? \"\$0\" \"\$@\"\n' '''\n")


def main(built: Path, final: Path) -> None:
    """Rewrite what names `built`, compile anew, and fail where anything names it still."""
    new, olds = str(final).encode(), {str(path).encode() for path in (built, built.resolve())}
    programs = [path for path in (built / "pyvenv.cfg", *(built / "bin").iterdir()) if is_plain(path)]
    changed = [path for path in programs for old in olds if rewrite(path, old, new)]
    for record in built.glob("lib/python3*/site-packages/*.dist-info/RECORD"):
        update(record, {path.resolve() for path in changed})
    for cache in [*built.rglob("__pycache__")]:
        shutil.rmtree(cache)
    # 2: not a word about the templates of some package that are no Python. pip says none either.
    compileall.compile_dir(built / "lib", maxlevels=50, quiet=2, stripdir=str(built), prependdir=str(final))
    left = [path for path in built.rglob("*") if any(names(path, old) for old in olds)]
    if left:
        sys.exit(f"relocate.py: {', '.join(map(str, left))}: contains {built}, where it was built.")


def is_plain(path: Path) -> bool:
    """Whether it is a file of its own."""
    return path.is_file() and not path.is_symlink()


def rewrite(path: Path, old: bytes, new: bytes) -> bool:
    """Replace `old` in a file; whether there was any."""
    text = path.read_bytes()
    if old not in text:
        return False
    if found := BY_SHELL.match(text):
        python = found[1].replace(old, new)
        if len(b"#!" + python) <= SHEBANG_MOST:
            text = b"#!" + python + b"\n" + text[found.end() :]
    path.write_bytes(text.replace(old, new))
    return True


def update(record: Path, changed: set[Path]) -> None:
    """Let a package's list of files have the hashes and sizes of those that were changed."""
    site = record.parents[1]
    rows = list(csv.reader(io.StringIO(record.read_text(encoding="utf-8"))))
    for row in rows:
        path = (site / row[0]).resolve()
        if path in changed:
            text = path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
            row[1:] = [f"sha256={digest}", str(len(text))]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    record.write_text(written.getvalue(), encoding="utf-8")


def names(path: Path, old: bytes) -> bool:
    """Whether a file's content, or where a link leads, names `old`."""
    if path.is_symlink():
        return old in str(path.readlink()).encode()
    return path.is_file() and old in path.read_bytes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
