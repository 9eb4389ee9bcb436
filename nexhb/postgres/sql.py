"""Find sql/ and split its files into named queries: `-- name: x` starts a query, which ends at the next such line.

`{{content: s.$column}}` stands for a list with one item for each column of a heartbeat; sql/README.md explains it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from nexhb.heartbeat import CONTENT, FACTS, MEASURED, Column

_COLUMNS = {"content": CONTENT, "measured": MEASURED, "facts": FACTS}
_LIST = re.compile(r"\{\{(\w+): (.+?)\}\}", re.DOTALL)
_ARGUMENT = re.compile(r"\$(\d+)…")
_NAME = re.compile(r"^-- name: ([a-z][a-z0-9_]*)\s*$", re.MULTILINE)


@cache
def root() -> Path:
    """Return the folder sql/: the packaged one in a wheel, else the one beside the package in a checkout.

    (An editable install leaves a frozen copy elsewhere, outside of this package, which nothing reads.)
    """
    package = Path(__file__).resolve().parent.parent
    packaged = package / "sql"
    return packaged if packaged.is_dir() else package.parent / "sql"


def parse(text: str) -> Mapping[str, str]:
    """Return the named queries of one file, with their lists of columns written out. Raises ValueError if a name occurs
    twice or has no text, and KeyError for an unknown list."""
    parts = _NAME.split(text)[1:]
    statements: dict[str, str] = {}
    for name, query in zip(parts[::2], parts[1::2], strict=True):
        body = query.strip()
        statement = "\n".join(line for line in body.splitlines() if not line.startswith("--")).strip()
        if name in statements or not statement:
            raise ValueError(f"query {name!r} is defined twice or empty")
        statements[name] = _LIST.sub(_written_out, statement.rstrip(";"))
    return MappingProxyType(statements)


def _written_out(match: re.Match[str]) -> str:
    """Return the item of a list for each of its columns. The item after ` | ` is used for a column of the label."""
    item, _, of_label = match[2].partition(" | ")
    columns = enumerate(_COLUMNS[match[1]])
    return ", ".join(_item(of_label if of_label and c.in_label else item, c, index) for index, c in columns)


def _item(text: str, column: Column, index: int) -> str:
    numbered = _ARGUMENT.sub(lambda first: f"${int(first[1]) + index}", text)
    return (
        numbered.replace("$column", column.name).replace("$type", column.type).replace("$section", str(column.section))
    )


@cache
def queries(file: str) -> Mapping[str, str]:
    """Return the queries of sql/queries/FILE.sql: name → statement."""
    return parse((root() / "queries" / f"{file}.sql").read_text(encoding="utf-8"))


@cache
def history_reads() -> Mapping[str, str]:
    """Return the old system's queries as that system ran them: name → statement."""
    return parse((root() / "legacy" / "reads.sql").read_text(encoding="utf-8"))
