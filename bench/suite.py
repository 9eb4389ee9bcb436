"""`make bench`: every scenario, each on a daemon of its own; results as JSON and one table of limits and verdicts."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from bench import progress, stack
from bench.finding import NOT_QUIET, Finding, figure, quiet, row
from bench.report import Limit, Verdict, hold, say_broken, write_text
from bench.runs import archive, ceiling, kill, offline, overload, reader, reconnect, steady
from bench.scenarios import (
    ARCHIVE,
    OVERLOAD,
    SCENARIOS,
    ArchiveScenario,
    CeilingScenario,
    KillScenario,
    OfflineQueryScenario,
    OpenLoopScenario,
    OverloadScenario,
    ReaderScenario,
    ReconnectScenario,
    Scenario,
)
from nexhb import log

RESULTS: Final = Path(__file__).resolve().parent / "results"
WHERE: Final = "Where the result goes; bench/results/, or with other settings than the defaults its quick/."
_SIGNS: Final = {"at_most": "≤", "at_least": "≥"}


def run_one(scenario: Scenario) -> Finding:
    """Run a scenario by its kind."""
    match scenario:
        case OpenLoopScenario():
            finding = steady.run(scenario)
        case OfflineQueryScenario():
            finding = offline.run(scenario)
        case ReconnectScenario():
            finding = reconnect.run(scenario)
        case CeilingScenario():
            finding = ceiling.run(scenario)
        case KillScenario():
            finding = kill.run(scenario)
        case ArchiveScenario():
            finding = archive.run(scenario)
        case ReaderScenario():
            finding = reader.run(scenario)
        case OverloadScenario():
            finding = overload.run(scenario)
    return finding


def run_all(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter; results go to bench/results/quick/.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="These alone: a name, or how it begins.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go.")] = None,
) -> None:
    """Run every scenario and write bench/results/. Exit 0: every limit of every scenario was kept."""
    out = where(out, usual=not quick)
    console = progress.console()
    chosen = [each.quicker() if quick else each for each in _chosen(only)]
    findings = [_kept(each.name, each.title, partial(run_one, each), out, console) for each in chosen]
    end_all(findings, out, console)


def run_archive(
    devices: Annotated[int, typer.Option(min=1, help="Devices of the old day, and of the load.")] = ARCHIVE.devices,
    rows_per_device: Annotated[
        int, typer.Option(min=1, max=2880, help="Heartbeats of each in that day.")
    ] = ARCHIVE.beats,
    out: Annotated[Path | None, typer.Option(help=WHERE)] = None,
) -> None:
    """Archive a day under load and one alone. Exit 0: every limit was kept."""
    chosen = replace(ARCHIVE, devices=devices, beats=rows_per_device)
    if chosen != ARCHIVE:
        chosen = replace(chosen, title=f"days of {devices:,} devices, {rows_per_device:,} rows each")
    one(chosen.name, chosen.title, partial(run_one, chosen), where(out, usual=chosen == ARCHIVE))


def run_overload(
    seconds: Annotated[float, typer.Option(min=5, help="How long.")] = OVERLOAD.overload_s,
    connections: Annotated[int, typer.Option(min=100, help="Connections of the generator.")] = OVERLOAD.connections,
    queue_items: Annotated[int, typer.Option(min=1, help="ingest.queue_items of the daemon.")] = OVERLOAD.queue_items,
    out: Annotated[Path | None, typer.Option(help=WHERE)] = None,
) -> None:
    """Send twice what the machine takes. Exit 0: every limit was kept."""
    chosen = replace(OVERLOAD, overload_s=seconds, connections=connections, queue_items=queue_items)
    if chosen != OVERLOAD:
        chosen = replace(chosen, title=f"twice what the machine takes for {seconds:g} s, {connections:,} connections")
    one(chosen.name, chosen.title, partial(run_one, chosen), where(out, usual=chosen == OVERLOAD))


def _chosen(only: Sequence[str] | None) -> list[Scenario]:
    found = [each for each in SCENARIOS if not only or any(each.name.startswith(name) for name in only)]
    if only and not all(any(each.name.startswith(name) for each in SCENARIOS) for name in only):
        raise typer.BadParameter(f"there are {', '.join(each.name for each in SCENARIOS)}", param_hint="--only")
    return found


def where(out: Path | None, *, usual: bool) -> Path:
    """Where a result goes, if nobody says: what was measured in another way never takes the place of the figures."""
    return out or (RESULTS if usual else RESULTS / "quick")


def one(name: str, title: str, run: Callable[[], Finding], out: Path) -> NoReturn:
    """A command of one scenario: run it, keep what came of it, say so, and leave by its exit code."""
    console = progress.console()
    finding = _kept(name, title, run, out, console)
    write_summary(out)
    end(finding, out, console)


def _kept(name: str, title: str, run: Callable[[], Finding], out: Path, console: Console) -> Finding:
    """Run one, say what came of it, and keep it. A daemon that fails is a broken scenario, not the end of all."""
    # the days that a run makes are no news to whoever watches
    log.setup("warning")
    console.print(f"\n[bold]{name}[/]  {title}", highlight=False)
    try:
        finding = run()
    except stack.StackError as error:
        finding = broken(name, title, str(error))
    console.print(as_table(finding))
    write(finding, out)
    return finding


def broken(name: str, title: str, why: str) -> Finding:
    """The finding of a run that could not be brought to its end."""
    return Finding(name, title, (hold(Limit("the run came to its end", "", 1, "at_least"), 0),), {"failed": why})


def write(finding: Finding, out: Path) -> None:
    """Keep a finding, with when and where it was measured."""
    at = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    text = json.dumps({**finding.to_json(), **at}, indent=2, ensure_ascii=False)
    write_text(_place(finding, out), text + "\n")


def _place(finding: Finding, out: Path) -> Path:
    return out / f"{finding.name}.json"


def keep(finding: Finding, out: Path, console: Console) -> None:
    """Show a finding, keep it, and write the summary of all that are kept there."""
    console.print(as_table(finding))
    write(finding, out)
    write_summary(out)


def end(finding: Finding, out: Path, console: Console) -> NoReturn:
    """Say where a kept finding lies and what is wrong with it, below all the rest, and leave by its exit code."""
    console.print(f"Result in {_place(finding, out)}.", soft_wrap=True, highlight=False)
    leave((finding,), console)


def end_all(findings: Sequence[Finding], out: Path, console: Console) -> NoReturn:
    """The same of several, with the table of them all."""
    summary = write_summary(out)
    console.print(f"\nResults in {out}, the table of them all in {summary}.", soft_wrap=True, highlight=False)
    leave(findings, console)


def leave(findings: Sequence[Finding], console: Console) -> NoReturn:
    """Say what is wrong with findings, below all the rest, and leave by their exit code."""
    names = ", ".join(finding.name for finding in findings if not finding.ok)
    of = f" in {names}" if len(findings) > 1 else ""
    say_broken(console, [verdict for finding in findings for verdict in finding.verdicts], of)
    if not all(quiet(finding.others_cores) for finding in findings):
        console.print(NOT_QUIET, highlight=False)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def as_table(finding: Finding) -> Table:
    """A finding for a person."""
    out = Table(show_header=False, box=None, padding=(0, 1))
    for name, text in finding.figures.items():
        out.add_row(name, text)
    for verdict in finding.verdicts:
        out.add_row(verdict.name, said(verdict))
    return out


def said(verdict: Verdict) -> str:
    """A verdict for a person."""
    mark = "[green]kept[/]" if verdict.ok else "[red]broken[/]"
    return f"{figure(verdict.value)}  ({_limit(verdict)})  {mark}"


def _limit(verdict: Verdict) -> str:
    return f"{_SIGNS[verdict.kind]} {figure(verdict.limit)}"


# ── the table of all ─────────────────────────────────────────────────────────────────────────────────────


def write_summary(out: Path) -> Path:
    """summary.md from every finding's NAME.json that lies there; its path. Commands keep other files there as well."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    found = [each for each in read if "verdicts" in each]
    lines = ["# Results", "", "Written by `python -m bench`; README.md beside this folder says what is measured.", ""]
    lines += ["| scenario | what | value | limit | |", "| --- | --- | ---: | ---: | --- |"]
    for each in found:
        lines += [_verdict_row(each["name"], Verdict(**verdict)) for verdict in each["verdicts"]]
    for each in found:
        lines += _section(each)
    path = out / "summary.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _verdict_row(name: str, verdict: Verdict) -> str:
    mark = "kept" if verdict.ok else "**broken**"
    return row((name, verdict.name, figure(verdict.value), _limit(verdict), mark))


def _section(found: dict[str, Any]) -> list[str]:
    lines = ["", f"## {found['name']}: {found['title']}", "", f"{found['measured_at']}, {found['machine']}", ""]
    for name, text in found["figures"].items():
        # a table of its own keeps its columns
        lines += ["```", text, "```"] if "\n" in text else [f"- {name}: {text}"]
    return lines


def machine() -> str:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown CPU")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} cores, {model}, {ram:.0f} GB, Linux {platform.release()}, Python {platform.python_version()}"
    )
