"""How far long work is: a bar for a person who watches, a line now and then otherwise. On stderr: stdout has the
result alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0

Show = Callable[[int, int, str], None]  # done, of how many, what else there is to say


@contextmanager
def shown(what: str) -> Iterator[Show]:
    """For the block: a function that is told how far it is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, more="")
        yield lambda done, total, more: bar.update(task, completed=done, total=total, more=more)


def _lines(what: str) -> Show:
    started = last = time.monotonic()

    def show(done: int, total: int, more: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S and done < total:
            return
        last = now
        left = f", {_left(done, total, now - started)} left" if 0 < done < total else ""
        with suppress(OSError):  # work goes on where nobody can be told how far it is
            typer.echo(f"{what}: {done:,} of {total:,}{f', {more}' if more else ''}{left}", err=True)

    return show


def _left(done: int, total: int, so_far_s: float) -> str:
    seconds = round(so_far_s * (total - done) / done)
    return f"{seconds // 60}:{seconds % 60:02}"
