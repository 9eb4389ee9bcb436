"""`python -m bench daemons`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from bench import progress, stack, suite
from bench.compare.command import PAGE
from bench.compare.page import between
from bench.daemons import run
from bench.daemons.found import BEGIN, END, Found, Round, section, verdicts
from bench.finding import Finding, figure
from bench.report import write_text
from bench.scenarios import DAEMONS
from nexhb import log


def daemons(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter rounds; nothing is written into the page.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    docs: Annotated[Path | None, typer.Option(help="A page with markers.")] = None,
) -> None:
    """Run several daemons on one PostgreSQL, in two minutes. Exit 0: every limit was kept."""
    console = progress.console()
    plan = DAEMONS.quicker() if quick else DAEMONS
    out = suite.where(out, usual=not quick)
    docs = docs or (None if quick else PAGE)
    log.setup("warning")
    console.print(f"\n[bold]{plan.name}[/]  {plan.title}", highlight=False)
    found: Found | None = None
    try:
        found = run.run(plan, lambda part: console.print(f"  {part}", highlight=False))
        others = tuple(each.others_cores for each in found.rounds)
        finding = Finding(plan.name, plan.title, verdicts(found), _figures(found), _plain(found), others)
    except stack.StackError as error:
        finding = suite.broken(plan.name, plan.title, str(error))
    suite.keep(finding, out, console)
    if found is not None and docs is not None:
        text = section(found, finding.verdicts, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {suite.machine()}")
        write_text(docs, between(docs.read_text(encoding="utf-8"), text, BEGIN, END))
        console.print(f"Tables in {docs}.", soft_wrap=True, highlight=False)
    suite.end(finding, out, console)


def _figures(found: Found) -> dict[str, str]:
    copies = found.copies
    figures = {each.name: _line(each) for each in found.rounds}
    figures["the same to all"] = (
        f"{copies.heartbeats:,} heartbeats to {copies.daemons} daemons: {copies.acknowledged:,} acknowledged, "
        f"{copies.written:,} written, {copies.staged:,} batches redone"
    )
    figures["nightly on all at once"] = ", ".join(f"{count} {status}" for status, count in found.jobs.items())
    return figures | ({"several hosts": f"not tried: {found.no_hosts}"} if found.no_hosts else {})


def _line(each: Round) -> str:
    return (
        f"{figure(each.rate_per_s)}/s, p99 {figure(each.p99_ms)} ms; cores: daemons {each.daemon_cores:g}, PostgreSQL "
        f"{each.postgres_cores:g}, generator {each.generator_cores:g}, others {each.others_cores:g}"
    )


def _plain(found: Found) -> dict[str, object]:
    return {
        **asdict(found),
        "rounds": [each._asdict() for each in found.rounds],
        "copies": found.copies._asdict(),
        "jobs": dict(found.jobs),
    }
