"""Print lists: as a table at a terminal, as plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import chain

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nexhb.texts import shown

Rows = Iterable[Sequence[str]]


def show(columns: Sequence[str], rows: Rows) -> None:
    """Print a table at a terminal, with long cells wrapped; else the header and the rows as lines with tabs. Cells are
    never truncated, and names from devices are neither interpreted as markup nor as control characters."""
    if not sys.stdout.isatty():
        for row in chain((columns,), rows):
            typer.echo("\t".join(shown(cell) for cell in row))
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console().print(table)
