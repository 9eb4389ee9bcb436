"""`python -m bench micro`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvloop

from bench import progress, suite
from bench.finding import Finding
from bench.micro import rows, status
from nexhb import log


def micro(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows; last status at 2,000 devices only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where results go.")] = None,
) -> None:
    """Weigh the history's layout and the last status' indexes. Without --quick ten minutes. Exit 0: limits kept."""
    out = suite.where(out, usual=not quick)
    console = progress.console()
    log.setup("warning")
    findings = uvloop.run(_all(quick=quick))
    for finding in findings:
        console.print(f"\n{finding.title}\n", highlight=False, soft_wrap=True)
        console.print(finding.figures["table"], highlight=False, soft_wrap=True)
        for verdict in finding.verdicts:
            console.print(f"{verdict.name}: {suite.said(verdict)}", highlight=False, soft_wrap=True)
        suite.write(finding, out)
    suite.end_all(findings, out, console)


async def _all(*, quick: bool) -> list[Finding]:
    return [await rows.run(quick=quick), *await status.run(quick=quick)]
