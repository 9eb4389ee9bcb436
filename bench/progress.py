"""How far a run is, on one line, for a person who watches; nothing for a file or a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from bench.load import Progress


def console() -> Console:
    """The terminal; for a file or a pipe, lines of one hundred characters."""
    found = Console()
    return found if found.is_terminal else Console(width=100)


@contextlib.contextmanager
def line(total: int, what: str) -> Iterator[Progress | None]:
    """A line for the block, drawn when the run says so: a thread that draws would take the generator's time."""
    if not Console().is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def show(_sent: int, ok: int) -> None:
            bar.update(task, completed=ok, refresh=True)

        yield show
