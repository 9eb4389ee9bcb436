"""`python -m bench status`."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from bench import progress, stack, suite
from bench.compare.command import PAGE
from bench.compare.page import between
from bench.finding import Finding
from bench.micro.status import Grown
from bench.report import Percentiles, write_text
from bench.scenarios import STATUS
from bench.status import run
from bench.status.found import BEGIN, END, Found, List, section, verdicts
from nexhb import log


def status(
    devices: Annotated[int, typer.Option(min=1_000, help="Rows of device_last_status.")] = STATUS.devices,
    silent: Annotated[int, typer.Option(min=1, max=9_999, help="Of them offline.")] = STATUS.silent,
    quick: Annotated[bool, typer.Option("--quick", help="Less of all but the rows; nothing goes to the page.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    docs: Annotated[Path | None, typer.Option(help="A page with markers.")] = None,
) -> None:
    """Ask a last status of a million devices over HTTP, and grow it, in four minutes. Exit 0: every limit was kept."""
    console = progress.console()
    plan = STATUS.quicker() if quick else STATUS
    if (devices, silent) != (plan.devices, plan.silent):
        title = plan.title.replace("1,000,000", f"{devices:,}").replace("1,000 of", f"{silent:,} of")
        plan = replace(plan, devices=devices, silent=silent, senders=min(plan.senders, devices // 2), title=title)
    out = suite.where(out, usual=plan == STATUS)
    docs = docs or (PAGE if plan == STATUS else None)
    log.setup("warning")
    console.print(f"\n[bold]{plan.name}[/]  {plan.title}", highlight=False)
    found: Found | None = None
    try:
        found = run.run(plan, lambda part: console.print(f"  {part}", highlight=False))
        figures = {each.path: _list(each) for each in found.lists}
        figures["the first one's rows by asyncpg alone"] = _spread(found.alone)
        figures |= {f"{each.devices:,} devices, {each.minutes} minutes": _grown(each) for each in found.growth}
        figures["machine"] = f"{found.others_cores:.2f} cores were busy with something else"
        held = verdicts(plan, found)
        finding = Finding(plan.name, plan.title, held, figures, _plain(found), (found.others_cores,))
    except stack.StackError as error:
        finding = suite.broken(plan.name, plan.title, str(error))
    suite.keep(finding, out, console)
    if found is not None and docs is not None:
        where = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {suite.machine()}"
        text = section(plan, found, finding.verdicts, where)
        write_text(docs, between(docs.read_text(encoding="utf-8"), text, BEGIN, END))
        console.print(f"Tables in {docs}.", soft_wrap=True, highlight=False)
    suite.end(finding, out, console)


def _list(each: List) -> str:
    return f"{each.devices:,} devices; {_spread(each.latency)}"


def _spread(latency: Percentiles) -> str:
    return f"p50 {latency.p50_ms} ms, p95 {latency.p95_ms} ms, p99 {latency.p99_ms} ms"


def _grown(each: Grown) -> str:
    return (
        f"{each.upserts_per_s:,}/s, {each.hot_share:.0%} HOT; {sum(each.before):,.1f} MB before, "
        f"{sum(each.after):,.1f} MB after"
    )


def _plain(found: Found) -> dict[str, object]:
    lists = [{**each._asdict(), "latency": asdict(each.latency)} for each in found.lists]
    growth = [{**asdict(each), "before": each.before._asdict(), "after": each.after._asdict()} for each in found.growth]
    return {
        "lists": lists,
        "alone": asdict(found.alone),
        "growth": growth,
        "hot_share": found.hot_share,
        "updates": found.updates,
        "others_cores": found.others_cores,
    }
