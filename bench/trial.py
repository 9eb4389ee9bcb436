"""Send a load to a daemon of the run, then examine the rows, the memory and the limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from bench.check import Check, check
from bench.finding import Finding, spread
from bench.fleet import Account, Device, Schedule
from bench.load import LoadRun, Scheduled, stream, target
from bench.report import Limit, Result, SendLog, Verdict, counts_of, judge
from bench.stack import Stack

SEED: Final = 1
# Each connection of the generator carries the heartbeats of many devices, and one simulated device may stand for many,
# so the rate limit per device must not apply.
UNLIMITED: Final = {"NEXHB_INGEST__DEVICE_PER_MINUTE": "1000000", "NEXHB_INGEST__DEVICE_BURST": "1000000"}
EVERY_ROW: Final = (
    Limit("heartbeats acknowledged, but not in the database", "check_missing", 0),
    Limit("heartbeats in the database that were never sent", "check_unexpected", 0),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a run with its verdicts, and the comparison with the database."""

    result: Result
    check: Check

    def finding(self, name: str, title: str, *verdicts: Verdict, figures: Mapping[str, str] | None = None) -> Finding:
        """Return the run as a finding, with more verdicts and figures."""
        result, rows = self.result, self.check.lines[0]
        lines = {
            "acknowledged": f"{result.ok:,} of {result.sent:,} sent, {result.rate_per_s:,.0f}/s",
            "latency": spread(result.latency),
            "rows": f"{rows.found:,} found, {rows.expected:,} expected",
            "daemon": f"{result.extra['daemon_rss_mb']:g} MB",
        }
        details: dict[str, Any] = asdict(replace(result, verdicts=())) | {"check": asdict(self.check)}
        cores = () if result.others_cores is None else (result.others_cores,)
        verdicts = (*result.verdicts, *verdicts)
        return Finding(name, title, verdicts, lines | dict(figures or {}), details, cores)


def combined(runs: Sequence[LoadRun]) -> LoadRun:
    """Return the last run with the counts and the records of all runs, since the database has the rows of all runs."""
    record = SendLog()
    for each in runs:
        record.extend(each.sends)
    counts = counts_of([each.result for each in runs])
    return LoadRun(replace(runs[-1].result, **counts), record, runs[-1].began_at_s)


async def send(own: Stack, fleet: Sequence[Device], plan: Schedule, **options: Any) -> LoadRun:
    """Send a schedule to the daemon in open loop; return the run."""
    to = target(own.url)
    options |= {"duration_s": plan.duration_s, "pids": (own.pid,)}
    return await stream(to, Scheduled(to, fleet, plan), plan.offset_us, **options)


async def examine(own: Stack, fleet: Sequence[Account | Device], run: LoadRun, limits: Iterable[Limit]) -> Trial:
    """Read the daemon's memory and compare the rows; return the run with a verdict for each limit."""
    memory_mb = own.memory().rss_mb
    async with own.connected() as conn:
        compared = await check(conn, fleet, run.sends)
    result = run.result.with_extra(
        daemon_rss_mb=memory_mb, check_missing=compared.missing, check_unexpected=compared.unexpected
    )
    return Trial(judge(result, (*limits, *EVERY_ROW)), compared)
