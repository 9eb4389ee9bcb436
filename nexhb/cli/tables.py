"""Lists: a table for a person who watches, plain lines in a pipe."""

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
    """At a terminal a table in which long cells are folded and none is cut; else the columns' names and the rows, a
    line each with tabs between, whole. What a device calls itself is no markup, and moves no cursor."""
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
