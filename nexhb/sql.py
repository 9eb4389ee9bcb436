"""Finds sql/ and cuts its files into named queries: `-- name: x` starts one, its text runs to the next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

_NAME = re.compile(r"^-- name: ([a-z][a-z0-9_]*)\s*$", re.MULTILINE)


@cache
def root() -> Path:
    """The folder sql/: the packaged one in a wheel, else the one beside the package in a checkout.

    (An editable install leaves a frozen copy elsewhere, which nothing reads: it is not inside this package.)
    """
    package = Path(__file__).resolve().parent
    packaged = package / "sql"
    return packaged if packaged.is_dir() else package.parent / "sql"


def parse(text: str) -> Mapping[str, str]:
    """Named queries of one file. Raises ValueError where a name stands twice or has no text."""
    parts = _NAME.split(text)[1:]
    found: dict[str, str] = {}
    for name, query in zip(parts[::2], parts[1::2], strict=True):
        body = query.strip()
        statement = "\n".join(line for line in body.splitlines() if not line.startswith("--")).strip()
        if name in found or not statement:
            raise ValueError(f"query {name!r} is named twice or empty")
        found[name] = statement.rstrip(";")
    return MappingProxyType(found)


@cache
def queries(room: str) -> Mapping[str, str]:
    """The queries of sql/queries/ROOM.sql: name → statement."""
    return parse((root() / "queries" / f"{room}.sql").read_text(encoding="utf-8"))


@cache
def legacy() -> Mapping[str, str]:
    """The seed's queries, as the old system ran them: name → statement."""
    return parse((root() / "legacy" / "reads.sql").read_text(encoding="utf-8"))
