"""nexhb perf-diff: show how the fast reads compare with reads of the history."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from nexhb import cli, clock
from nexhb.reading import comparison

_commands = typer.Typer(no_args_is_help=True, help="Comparisons of the fast reads with the history (flag perf_diff).")
cli.app.add_typer(_commands, name="perf-diff")


@_commands.callback(help="Comparisons of the fast reads with the history.")
def _group() -> None:
    pass


async def _read(hours: int) -> dict[str, Any]:
    async with cli.opened_connection(cli.settings(), application="nexhb perf-diff", command_timeout_s=60) as conn:
        return await comparison.report(conn, clock.system_now() - timedelta(hours=hours))


@_commands.command(help="Show the times of both, speed-ups and mismatches. Exit code 1 if there is a mismatch.")
def report(
    hours: Annotated[int, typer.Option(min=1, max=24 * 8, help="How many hours to look back.")] = 24,
    as_json: cli.Json = False,
) -> None:
    comparisons = cli.run(_read(hours))
    if as_json:
        cli.show(comparisons)
    else:
        _show(comparisons, hours)
    raise typer.Exit(cli.EXIT_FAILED if comparisons["last_mismatches"] else 0)


def _show(comparisons: dict[str, Any], hours: int) -> None:
    if not comparisons["queries"]:
        typer.echo(
            f"Nothing was compared within {hours} h. `nexhb flags set perf_diff=on` compares a share of the reads of "
            "offline, unity-down and single devices."
        )
        return
    typer.echo(f"{'p50 / p95 / p99':12} {'':5} {'fast, ms':>25} {'legacy, ms':>28} {'times faster':>25} mismatches")
    for row in comparisons["queries"]:
        fast, history = _percentiles(row["fast_ms"], 2), _percentiles(row["legacy_ms"], 1)
        times = _percentiles(row["speed_up"], 1)
        typer.echo(
            f"{row['query']:12} {row['comparisons']:5} {fast:>25} {history:>28} {times:>25} {row['mismatches']:10}"
        )
    for mismatch in comparisons["last_mismatches"]:
        at, query, differ = f"{mismatch['compared_at']:%Y-%m-%d %H:%M:%SZ}", mismatch["query"], mismatch["rows_differ"]
        typer.echo(f"  {at}  {query}: {differ} rows differ, {', '.join(mismatch['examples'])}")
    if more := comparisons["mismatches_not_listed"]:
        typer.echo(f"  and {more:,} more mismatches")


def _percentiles(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in values)
