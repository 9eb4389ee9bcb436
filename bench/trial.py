"""A load against a daemon of one's own, and what is looked at after it: the rows, the memory, the limits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.check import Check, Named, check
from bench.cost import Memory
from bench.load import LoadRun
from bench.report import Limit, Result, SendLog, judge, table, to_json, write_text
from bench.stack import Stack

EVERY_ROW: Final = (
    Limit("acknowledged and not in the database", "check_missing", 0),
    Limit("in the database and never sent", "check_unexpected", 0),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """A run, judged, and the comparison with the database."""

    result: Result
    check: Check
    memory: Memory

    @property
    def ok(self) -> bool:
        """Whether every limit was kept; the check's are among them."""
        return self.result.verdicts_ok

    def to_json(self) -> dict[str, object]:
        """The result's keys, and the check."""
        return {**to_json(self.result), "check": self.check.to_json()}

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """Print it for a person."""
        console.print(table(self.result))
        console.print(self.check.table())


def together(runs: Sequence[LoadRun]) -> LoadRun:
    """The last result, with the counts and the record of all of them: the database holds them all."""
    record = SendLog()
    for each in runs:
        record.extend(each.sends)
    counts = {
        name: sum(getattr(each.result, name) for each in runs)
        for name in ("sent", "ok", "refused", "failed", "deduplicated")
    }
    return LoadRun(replace(runs[-1].result, **counts), record)


async def examine(stack: Stack, fleet: Sequence[Named], run: LoadRun, limits: Iterable[Limit]) -> Trial:
    """Read the daemon's memory, compare the rows, hold all of it against the limits."""
    memory = stack.memory()
    conn = await stack.connect()
    try:
        compared = await check(conn, fleet, run.sends)
    finally:
        await conn.close(timeout=5)
    extra = {
        **run.result.extra,
        "daemon_rss_mb": memory.rss_mb,
        "daemon_peak_mb": memory.peak_mb,
        "check_missing": compared.missing,
        "check_unexpected": compared.unexpected,
    }
    return Trial(judge(replace(run.result, extra=extra), (*limits, *EVERY_ROW)), compared, memory)
