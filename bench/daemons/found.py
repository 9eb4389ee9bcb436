"""What was found of several daemons: verdicts, and tables for docs/performance.md. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from bench.compare.page import NOT_QUIET, table, verdict_table
from bench.finding import figure, quiet
from bench.report import Limit, Verdict, hold

BEGIN: Final = "<!-- daemons:begin, written by `make bench-daemons` -->"
END: Final = "<!-- daemons:end -->"


class Round(NamedTuple):
    """So many daemons, as fast as it goes; CPU in cores, daemons' and generators' all together."""

    name: str
    daemons: int
    rate_per_s: float
    p99_ms: float | None
    daemon_cores: float
    postgres_cores: float
    generator_cores: float
    others_cores: float
    # batches that were redone because another daemon had written a heartbeat of theirs
    staged: int


class Copies(NamedTuple):
    """The same heartbeats, sent to all daemons at once."""

    daemons: int
    heartbeats: int
    acknowledged: int
    written: int
    staged: int


@dataclass(frozen=True, slots=True)
class Found:
    """All of it. `checks`: name of a database → rows missing, rows that should not be."""

    rounds: tuple[Round, ...]
    copies: Copies
    # status → daemons that answered so; and the reasons of those that did not run
    jobs: Mapping[str, int]
    reasons: tuple[str, ...]
    checks: Mapping[str, tuple[int, int]]
    # requests that were not acknowledged, of all
    lacking: int
    # why there is no round on several hosts; empty where there is one
    no_hosts: str


def verdicts(found: Found) -> tuple[Verdict, ...]:
    """Every floor, kept or broken. How much faster several are is none: two cores are full with one."""
    copies, daemons = found.copies, found.copies.daemons
    missing = sum(lost for lost, _ in found.checks.values())
    strange = sum(more for _, more in found.checks.values())
    twice = abs(copies.heartbeats - copies.written)
    others = sum(count for status, count in found.jobs.items() if status not in {"completed", "skipped"})
    return (
        hold(Limit("requests not acknowledged", "", 0), found.lacking),
        hold(Limit("acknowledged and not in the database", "", 0), missing),
        hold(Limit("in the database twice, or never sent", "", 0), strange),
        hold(Limit("copies of a heartbeat not acknowledged", "", 0), copies.heartbeats * daemons - copies.acknowledged),
        hold(Limit("heartbeats of the copies not written exactly once", "", 0), twice),
        hold(Limit("daemons that ran the job, at least", "", 1, "at_least"), found.jobs.get("completed", 0)),
        hold(Limit("daemons that ran the job", "", 1), found.jobs.get("completed", 0)),
        hold(Limit("daemons whose job failed", "", 0), others),
        hold(
            Limit("daemons that skipped it for another reason than lock_held", "", 0),
            sum(reason != "lock_held" for reason in found.reasons),
        ),
    )


def section(found: Found, held: Sequence[Verdict], where: str) -> str:
    """All of it in Markdown; `where`: when and on what."""
    others = [each.others_cores for each in found.rounds]
    copies = found.copies
    parts = [
        "## Several daemons",
        "One PostgreSQL, and daemons that share a port (`server.reuse_port`): the kernel spreads connections. Closed "
        "loop, and every row compared. Hosts are network namespaces, each with a daemon and a generator of its own, "
        "which reach PostgreSQL by TCP over a veth. All of it shares this machine's cores: what several daemons "
        "gain here is what one leaves of them, and no more.",
        f"`make bench-daemons` writes this section. Measured {where}. Up to {max(others):.2f} cores were busy with "
        "something else while it ran." + ("" if quiet(others) else f" {NOT_QUIET}"),
        verdict_table(held),
        _rounds(found.rounds),
        f"{copies.heartbeats:,} heartbeats were sent to {copies.daemons} daemons at once: {copies.acknowledged:,} "
        f"answers of 200, {copies.written:,} rows, {copies.staged:,} batches redone through the staging table. "
        f"The nightly run, started on all at once: {_jobs(found)}.",
    ]
    if found.no_hosts:
        parts.append(f"Several hosts were not tried: {found.no_hosts}.")
    return "\n\n".join(parts)


def _jobs(found: Found) -> str:
    said = ", ".join(f"{count} {status}" for status, count in sorted(found.jobs.items()))
    return said + (f" ({', '.join(sorted(set(found.reasons)))})" if found.reasons else "")


def _rounds(rounds: Sequence[Round]) -> str:
    rows = (
        (
            each.name,
            figure(each.rate_per_s),
            f"{each.rate_per_s / rounds[0].rate_per_s:.2f}",
            figure(each.p99_ms),
            f"{each.daemon_cores:.2f}",
            f"{each.postgres_cores:.2f}",
            f"{each.generator_cores:.2f}",
            f"{each.others_cores:.2f}",
            figure(each.staged),
        )
        for each in rounds
    )
    head = (
        "", "heartbeats/s", "of one daemon's", "p99 ms", "daemons' cores", "PostgreSQL's", "generator's", "others'",
        "batches redone",
    )  # fmt: skip
    return table(head, rows)
