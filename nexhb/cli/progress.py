"""Show the progress of long work on stderr: a bar at a terminal, else a line from time to time. stdout has only the
result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0

Show = Callable[[int, int, str], None]  # arguments: done, total, text shown after these numbers


@contextmanager
def shown(title: str) -> Iterator[Show]:
    """Yield a function that shows the progress of the block."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, more="")
        yield lambda done, total, more: bar.update(task, completed=done, total=total, more=more)


def _lines(title: str) -> Show:
    started = last = time.monotonic()

    def show(done: int, total: int, more: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S and done < total:
            return
        last = now
        remaining = f", {_remaining(done, total, now - started)} left" if 0 < done < total else ""
        with suppress(OSError):  # a failure to show progress does not stop the work
            typer.echo(f"{title}: {done:,} of {total:,}{f', {more}' if more else ''}{remaining}", err=True)

    return show


def _remaining(done: int, total: int, elapsed_s: float) -> str:
    seconds = round(elapsed_s * (total - done) / done)
    return f"{seconds // 60}:{seconds % 60:02}"
