"""`python -m bench curve`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from bench import progress, stack, suite
from bench.compare.command import PAGE, worst
from bench.curve import page, run
from bench.curve.found import Curve, Point, verdicts
from bench.finding import Finding, figure, spread
from bench.scenarios import CURVE
from nexhb import log

_IDLE: Final = suite.RESULTS / "idle.json"
# of what `bench idle` found
_OF_IDLE: Final = ("connections", "memory", "latency", "not quiet")


def curve(
    quick: Annotated[bool, typer.Option("--quick", help="Short windows; nothing is written into the page.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    docs: Annotated[Path | None, typer.Option(help="A page with markers; charts go beside it.")] = None,
) -> None:
    """Measure fleets of 2,000 to 500,000 devices and the ceiling, in five minutes. Exit 0: every limit was kept."""
    console = progress.console()
    plan = CURVE.quicker() if quick else CURVE
    out = suite.where(out, usual=not quick)
    docs = docs or (None if quick else PAGE)
    log.setup("warning")
    console.print(f"\n[bold]{plan.name}[/]  {plan.title}", highlight=False)
    found: Curve | None = None
    try:
        outcome = run.run(plan, _idle(), lambda point: console.print(f"  {point}", highlight=False))
        found = outcome.curve
        checks = [verdict for trial in outcome.trials for verdict in trial.result.verdicts]
        finding = Finding(
            plan.name,
            plan.title,
            (*verdicts(found), *worst(checks)),
            {point.name: _line(point) for point in found.points},
            {**_plain(found), "checks": [trial.check.to_json() for trial in outcome.trials]},
            tuple(point.others_cores for point in found.points),
        )
    except stack.StackError as error:
        finding = suite.broken(plan.name, plan.title, str(error))
    suite.keep(finding, out, console)
    if found is not None and docs is not None:
        where = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {suite.machine()}"
        page.write(docs, found, finding.verdicts, where)
        console.print(f"Tables and charts in {docs}.", soft_wrap=True, highlight=False)
    suite.end(finding, out, console)


def _idle() -> dict[str, str]:
    """What `bench idle` found, where it ran."""
    if not _IDLE.is_file():
        return {}
    found = json.loads(_IDLE.read_text(encoding="utf-8"))
    return {"measured": found["measured_at"]} | {
        name: text for name, text in found["figures"].items() if name in _OF_IDLE
    }


def _line(point: Point) -> str:
    return (
        f"{figure(point.sent_per_s)}/s, {spread(point.latency)}; CPU {point.cpu.daemon_us:g} µs, PostgreSQL "
        f"{point.cpu.postgres_us:g} µs, {point.daemon_cores:g} of a core; {point.memory.end_mb:g} MB; "
        f"{figure(point.batch_mean)} a batch, queue wait {figure(point.queue_wait_ms)} ms, loop lag "
        f"{figure(point.loop_lag_ms)} ms: {point.wanted} daemon{'' if point.wanted == 1 else 's'}"
    )


def _plain(found: Curve) -> dict[str, object]:
    points = [{**asdict(point), "cpu": point.cpu._asdict(), "daemons_wanted": point.wanted} for point in found.points]
    return {"points": points, "known_bytes": found.known_bytes, "heard_bytes": found.heard_bytes, "idle": found.idle}
