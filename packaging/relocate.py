"""Relocate a virtual environment from the folder where it was built: `relocate.py BUILT FINAL`.

A package is built below DESTDIR, and installed in PREFIX. Its programs, configuration and compiled files must contain
the path of the installation, not the path of the build.
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

MAX_SHEBANG = 127  # longest first line of a program, in bytes, that every Linux version reads completely
# The first lines that pip writes if Python's path is too long for a shebang line or contains a space.
BY_SHELL = re.compile(rb"\A#!/bin/sh\n'''exec' \"?([^\"\n]*/bin/python[0-9.]*)\"? \"\$0\" \"\$@\"\n' '''\n")


def main(built: Path, final: Path) -> None:
    """Replace `built` in all files, compile again, and fail if a file still contains it."""
    new, olds = str(final).encode(), {str(path).encode() for path in (built, built.resolve())}
    programs = [path for path in (built / "pyvenv.cfg", *(built / "bin").iterdir()) if is_plain(path)]
    changed = [path for path in programs for old in olds if rewrite(path, old, new)]
    for record in built.glob("lib/python3*/site-packages/*.dist-info/RECORD"):
        update(record, {path.resolve() for path in changed})
    for cache in [*built.rglob("__pycache__")]:
        shutil.rmtree(cache)
    # quiet=2, as in pip: no messages about templates in packages, which are not valid Python.
    compileall.compile_dir(built / "lib", maxlevels=50, quiet=2, stripdir=str(built), prependdir=str(final))
    left = [path for path in built.rglob("*") if any(contains(path, old) for old in olds)]
    if left:
        sys.exit(f"relocate.py: {', '.join(map(str, left))}: contains {built}, the folder of the build.")


def is_plain(path: Path) -> bool:
    """Return whether the path is a regular file and no link."""
    return path.is_file() and not path.is_symlink()


def rewrite(path: Path, old: bytes, new: bytes) -> bool:
    """Replace `old` in a file, and return whether the file contained it."""
    text = path.read_bytes()
    if old not in text:
        return False
    if match := BY_SHELL.match(text):
        python = match[1].replace(old, new)
        if len(b"#!" + python) <= MAX_SHEBANG:
            text = b"#!" + python + b"\n" + text[match.end() :]
    path.write_bytes(text.replace(old, new))
    return True


def update(record: Path, changed: set[Path]) -> None:
    """Update the hashes and sizes of changed files in a package's RECORD."""
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


def contains(path: Path, old: bytes) -> bool:
    """Return whether a file's content, or a link's target, contains `old`."""
    if path.is_symlink():
        return old in str(path.readlink()).encode()
    return path.is_file() and old in path.read_bytes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
