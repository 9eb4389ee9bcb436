"""The report of a time-lapse."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tests.timelapse import nights
from tests.timelapse.checks import Check
from tests.timelapse.world import START, World

LONG = 200  # enough days for every kind of fault to happen


def missing(world: World) -> list[str]:
    """Return the faults that never happened."""
    return [kind.name for kind in nights.KINDS if not world.faults[kind.name]]


def progress(console: Console, world: World) -> None:
    """Show the progress on one line of a terminal."""
    if console.is_terminal:
        day = (world.now - START).days
        rows = f"{world.ledger.written:,} heartbeats, {sum(world.faults.values())} faults"
        console.print(f"day {day} of {world.settings.days}: {rows} ", end="\r", highlight=False)


def show(console: Console, world: World, results: list[Check], elapsed_s: float) -> bool:
    """Print the report. Return whether all checks passed."""
    table = Table("fault", "times", title=f"{world.settings.days} days, seed {world.settings.seed}")
    for name, times in sorted(world.faults.items()):
        table.add_row(name, f"{times}")
    console.print(table)
    ledger, fleet = world.ledger, world.fleet
    console.print(
        f"{ledger.written:,} heartbeats written, of which {ledger.written_again:,} again, for an archived day; "
        f"{ledger.deduplicated:,} deduplicated; {ledger.failed:,} refused with 503 and sent again. "
        f"{fleet.replayed:,} were replayed, {fleet.late_count:,} were made on an earlier day, "
        f"{fleet.duplicates:,} were sent twice.",
        highlight=False,
    )
    console.print("Jobs: " + ", ".join(f"{name} {n:,}" for name, n in sorted(world.done.items())), highlight=False)
    never = missing(world)
    figures = f"{len(nights.KINDS) - len(never)} of {len(nights.KINDS)} kinds"
    lines = [*results, Check("every kind of fault happened", figures, never if world.settings.days >= LONG else [])]
    result = Table("check", "figures", "")
    for check in lines:
        result.add_row(check.what, check.figures, "[red]wrong[/]" if check.wrong else "[green]ok[/]")
    console.print(result)
    for check in lines:
        for line in check.wrong[:5]:
            console.print(f"{check.what}: {line}", highlight=False, markup=False)
    console.print(f"{elapsed_s:.0f} s, seed {world.settings.seed}", highlight=False)
    return not any(check.wrong for check in lines)
