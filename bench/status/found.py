"""What was found of a large last status: verdicts, and tables for docs/performance.md. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from bench.compare.page import NOT_QUIET, table, verdict_table
from bench.finding import figure, quiet
from bench.micro.status import Grown
from bench.report import Limit, Percentiles, Verdict, hold
from bench.scenarios import StatusScenario

BEGIN: Final = "<!-- status:begin, written by `make bench-status` -->"
END: Final = "<!-- status:end -->"
PATHS: Final = ("/v1/devices/offline", "/v1/devices/unity-down")


class List(NamedTuple):
    """A list over HTTP."""

    path: str
    devices: int
    bytes: int
    latency: Percentiles


@dataclass(frozen=True, slots=True)
class Found:
    """All of it."""

    lists: tuple[List, ...]
    # the yardstick: the first list's rows fetched by asyncpg, and nothing done with them
    alone: Percentiles
    # of the updates of device_last_status while the lists were asked
    hot_share: float
    updates: int
    # heartbeats that were not acknowledged
    lacking: int
    others_cores: float
    growth: tuple[Grown, ...]


def verdicts(plan: StatusScenario, found: Found) -> tuple[Verdict, ...]:
    """Every floor, kept or broken."""
    silent, down = found.lists
    return (
        *(
            hold(Limit(f"{each.path}: {plan.p95.name}", "", plan.p95.limit), each.latency.p95_ms)
            for each in found.lists
        ),
        *(
            hold(Limit(f"{each.devices:,} devices: {plan.hot.name}", "", plan.hot.limit, "at_least"), each.hot_share)
            for each in found.growth
        ),
        hold(Limit("offline devices that are not in the list", "", 0), abs(plan.silent - silent.devices)),
        hold(Limit("devices listed with Unity down", "", plan.unity_down, "at_least"), down.devices),
        hold(Limit("heartbeats not acknowledged meanwhile", "", 0), found.lacking),
    )


def section(plan: StatusScenario, found: Found, held: tuple[Verdict, ...], where: str) -> str:
    """All of it in Markdown; `where`: when and on what."""
    parts = [
        "## The last status of a million devices",
        f"`GET /v1/devices/offline` and `/v1/devices/unity-down`, {plan.requests} times each over HTTP, by a process "
        f"of its own, on a device_last_status of {plan.devices:,} rows, {plan.silent:,} of them silent, while "
        f"{plan.rate_per_s:g} heartbeats a second come in from {plan.senders:,} other devices. In turn with them, from "
        "the same PostgreSQL: the first list's rows fetched by asyncpg as it comes, and nothing done with them.",
        f"`make bench-status` writes this section. Measured {where}. {found.others_cores:.2f} cores were busy with "
        "something else while it ran." + ("" if quiet([found.others_cores]) else f" {NOT_QUIET}"),
        verdict_table(held),
        _lists(found),
        f"{found.updates:,} rows were updated meanwhile, {found.hot_share:.0%} of them HOT: nearly all where no "
        "five minutes end meanwhile, few where they do. Over whole minutes of a fleet it is four of five, see below.",
        "What a fleet's updates make of the table: a heartbeat of each device a minute, by the writer's own statement "
        "in batches of 2,000, as fast as they go. So autovacuum has seconds for what a fleet takes minutes for, and "
        "the growth is the most that there can be.",
        _growth(found),
    ]
    return "\n\n".join(parts)


def _lists(found: Found) -> str:
    rows = [
        (each.path, figure(each.devices), f"{each.bytes / 1e3:,.0f}", *_spread(each.latency)) for each in found.lists
    ]
    rows.append(("the first one's rows by asyncpg alone", figure(found.lists[0].devices), "", *_spread(found.alone)))
    return table(("", "devices", "kB", "p50 ms", "p95 ms", "p99 ms"), rows)


def _spread(latency: Percentiles) -> tuple[str, str, str]:
    return figure(latency.p50_ms), figure(latency.p95_ms), figure(latency.p99_ms)


def _growth(found: Found) -> str:
    rows = (
        (
            f"{each.devices:,}",
            f"{each.minutes}",
            f"{each.took_s:,.0f}",
            figure(each.upserts_per_s),
            f"{each.hot_share:.0%}",
            f"{each.before.table_mb:,.1f} + {each.before.index_mb:,.1f}",
            f"{each.after.table_mb:,.1f} + {each.after.index_mb:,.1f}",
            f"{sum(each.after) / sum(each.before):.2f}",
        )
        for each in found.growth
    )
    head = ("devices", "minutes", "in s", "upserts/s", "HOT", "table + indexes before, MB", "after", "times")
    return table(head, rows)
