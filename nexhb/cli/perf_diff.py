"""nexhb perf-diff: how the fast reads compare with the history."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from nexhb import cli, daemon, perfdiff

_commands = typer.Typer(no_args_is_help=True, help="Reads that were asked both ways (flag perf_diff).")
cli.app.add_typer(_commands, name="perf-diff")


@_commands.callback(help="Reads that were asked both ways.")
def _group() -> None:
    pass


async def _read(hours: int) -> dict[str, Any]:
    async with cli.opened_connection(cli.settings(), application="nexhb perf-diff", command_timeout_s=60) as conn:
        return await perfdiff.report(conn, daemon.utc_now() - timedelta(hours=hours))


@_commands.command(help="Times of both ways, speed-ups and mismatches. Exit code 1 where there is a mismatch.")
def report(
    hours: Annotated[int, typer.Option(min=1, max=24 * 8, help="How far back.")] = 24,
    as_json: cli.Json = False,
) -> None:
    found = cli.run(_read(hours))
    if as_json:
        cli.show(found)
    else:
        _show(found, hours)
    raise typer.Exit(cli.EXIT_FAILED if found["last_mismatches"] else 0)


def _show(found: dict[str, Any], hours: int) -> None:
    if not found["queries"]:
        typer.echo(
            f"Nothing was compared within {hours} h. With `nexhb flags set perf_diff=on`, a share of the reads of "
            "offline, unity-down and single devices is."
        )
        return
    typer.echo(f"{'p50 / p95 / p99':12} {'':5} {'fast, ms':>25} {'legacy, ms':>28} {'times faster':>25} mismatches")
    for row in found["queries"]:
        fast, legacy = _three(row["fast_ms"], 2), _three(row["legacy_ms"], 1)
        times = _three(row["speed_up"], 1)
        typer.echo(
            f"{row['query']:12} {row['comparisons']:5} {fast:>25} {legacy:>28} {times:>25} {row['mismatches']:10}"
        )
    for one in found["last_mismatches"]:
        typer.echo(f"  {one['compared_at']:%Y-%m-%d %H:%M:%SZ}  {one['query']}: {one['rows_differ']} rows differ, "
                   f"{', '.join(one['examples'])}")  # fmt: skip
    if more := found["mismatches_not_listed"]:
        typer.echo(f"  and {more:,} mismatches more")


def _three(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in values)
