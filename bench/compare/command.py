"""`python -m bench compare`."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvloop
from rich.table import Table

from bench import progress, stack, suite
from bench.compare import found as f
from bench.compare import page
from bench.finding import Finding, figure, spread
from bench.report import Verdict
from bench.scenarios import COMPARE, CompareScenario
from nexhb import log

PAGE: Final = suite.RESULTS.parents[1] / "docs" / "performance.md"
_EXTRA: Final = ("fastapi", "uvicorn", "httptools", "sqlalchemy", "psycopg")


def compare(
    quick: Annotated[bool, typer.Option("--quick", help="One short round; nothing is written into the page.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    docs: Annotated[Path | None, typer.Option(help="A page with markers; charts go beside it.")] = None,
) -> None:
    """Measure nexhb beside floors and peers, in one run of eight minutes. Exit 0: every limit was kept."""
    console = progress.console()
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        console.print(f"{', '.join(missing)} are not installed: make bench-compare, or pip install -e '.\\[compare]'")
        raise typer.Exit(2)
    plan = COMPARE.quicker() if quick else COMPARE
    out = suite.where(out, usual=not quick)
    docs = docs or (None if quick else PAGE)
    log.setup("warning")
    console.print(f"\n[bold]{plan.name}[/]  {plan.title}", highlight=False)
    try:
        finding, found = _measured(plan)
    except stack.StackError as error:
        finding, found = suite.broken(plan.name, plan.title, str(error)), None
    suite.keep(finding, out, console)
    if found is not None:
        console.print(_singles(found))
        if docs is not None:
            where = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {suite.machine()}"
            page.write(docs, found, finding.verdicts, where)
            console.print(f"Tables and charts in {docs}.", soft_wrap=True, highlight=False)
    suite.end(finding, out, console)


def _measured(plan: CompareScenario) -> tuple[Finding, f.Found]:
    from bench.compare import contest  # noqa: PLC0415 - its peers are of an extra

    outcome = uvloop.run(contest.run(plan))
    found = outcome.found
    checks = [verdict for trial in outcome[1:] for verdict in trial.result.verdicts]
    verdicts = (*f.verdicts(found), *worst(checks))
    least = found.least
    lines = [outcome.steady.check.lines[0], outcome.rounds.check.lines[0]]
    figures = {
        **{name: _rates(each) for name, each in found.singles.items()},
        **{name: _rates(each) for name, each in found.batches.items()},
        **{f"COPY, {rows:,} rows": _rates(f.Rounds(per_s)) for rows, per_s in found.copies.items()},
        "COPY, values packed": _rates(f.Rounds(found.packed_copy)),
        **{
            f"at {pace.due_per_s:,.0f}/s": f"daemon {pace.cpu.daemon_us:g} µs, PostgreSQL {pace.cpu.postgres_us:g} µs "
            f"a heartbeat; {spread(pace.latency)}"
            for pace in found.paces
        },
        "2,000 devices": spread(found.steady),
        "same PostgreSQL, one client": f"one-row commit {least.one_row_commit_ms:g} ms, "
        f"SELECT 1 {least.select_1_ms:g} ms",
        "generator": f"{found.generator_us:g} µs of CPU a send, {found.generator_batch_us:g} µs a heartbeat of 500",
        "rows": f"{sum(line.found for line in lines):,} found, {sum(line.expected for line in lines):,} expected; "
        f"peers {found.kept:,} of {found.acknowledged:,}",
        "machine": f.busy(found.others_cores),
    }
    details = {**_plain(found), "checks": [trial.check.to_json() for trial in outcome[1:]]}
    return Finding(plan.name, plan.title, verdicts, figures, details, found.others_cores), found


def worst(verdicts: list[Verdict]) -> list[Verdict]:
    """One of each name: the broken one, where there is one."""
    by_name: dict[str, Verdict] = {}
    for each in sorted(verdicts, key=lambda verdict: verdict.ok):
        by_name.setdefault(each.name, each)
    return list(by_name.values())


def _rates(each: f.Rounds) -> str:
    cpu = "" if each.cpu is None else f"; CPU {each.cpu.daemon_us:g} µs, PostgreSQL {each.cpu.postgres_us:g} µs"
    over = "" if each.connections is None else f" over {each.connections} connections"
    return f"{figure(each.median)}/s{over}{cpu}"


def _plain(found: f.Found) -> dict[str, Any]:
    """With keys that JSON has."""
    values = asdict(found)
    values["pools"] = [
        {"pool": pool, "connections": connections, "rate_per_s": per_s}
        for (pool, connections), per_s in found.pools.items()
    ]
    return {**values, "copy_rows_per_s": found.copy}


def _singles(found: f.Found) -> Table:
    table = Table("", "heartbeats/s", "nexhb's, of it", box=None)
    for name, each in found.singles.items():
        table.add_row(name, figure(each.median), figure(found.times(name)))
    return table
