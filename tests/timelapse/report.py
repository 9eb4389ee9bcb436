"""What a time-lapse prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tests.timelapse import nights
from tests.timelapse.checks import Check
from tests.timelapse.world import START, World

LONG = 200  # days in which every card has its turn


def missing(world: World) -> list[str]:
    """The faults that were never met."""
    return [card.name for card in nights.CARDS if not world.faults[card.name]]


def progress(console: Console, world: World) -> None:
    """On one line, for a person who watches."""
    if console.is_terminal:
        day = (world.now - START).days
        rows = f"{world.ledger.written:,} heartbeats, {sum(world.faults.values())} faults"
        console.print(f"day {day} of {world.settings.days}: {rows} ", end="\r", highlight=False)


def show(console: Console, world: World, found: list[Check], elapsed_s: float) -> bool:
    """Everything; whether all is well."""
    table = Table("fault", "met", title=f"{world.settings.days} days, seed {world.settings.seed}")
    for name, times in sorted(world.faults.items()):
        table.add_row(name, f"{times}")
    console.print(table)
    ledger, fleet = world.ledger, world.fleet
    console.print(
        f"{ledger.written:,} heartbeats written, {ledger.again:,} of them once more for a day that was gone; "
        f"{ledger.deduplicated:,} deduplicated; {ledger.failed:,} answered 503 and sent again. "
        f"{fleet.replayed:,} were replayed, {fleet.stragglers:,} came for some earlier day, "
        f"{fleet.duplicates:,} were sent twice.",
        highlight=False,
    )
    console.print("The jobs: " + ", ".join(f"{name} {n:,}" for name, n in sorted(world.done.items())), highlight=False)
    never = missing(world)
    figures = f"{len(nights.CARDS) - len(never)} of {len(nights.CARDS)} kinds on cards"
    lines = [*found, Check("every kind of fault was met", figures, never if world.settings.days >= LONG else [])]
    result = Table("check", "figures", "")
    for check in lines:
        result.add_row(check.what, check.figures, "[red]wrong[/]" if check.wrong else "[green]ok[/]")
    console.print(result)
    for check in lines:
        for line in check.wrong[:5]:
            console.print(f"{check.what}: {line}", highlight=False, markup=False)
    console.print(f"{elapsed_s:.0f} s, seed {world.settings.seed}", highlight=False)
    return not any(check.wrong for check in lines)
