"""`python -m bench`: a fleet's load against nexhb, checked row by row, and nexhb compared with its peers."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench import load_command
from bench.finding import NOT_QUIET, PAGE, RESULTS, Finding, is_quiet, show, table_of, write, write_page
from bench.report import at_least
from bench.runs import Plan
from bench.runs.agents import Kill, Outage, Reconnect
from bench.runs.archive import Archive
from bench.runs.compare import Compare
from bench.runs.curve import Curve
from bench.runs.daemons import Daemons
from bench.runs.migration import Import
from bench.runs.overload import Overload
from bench.runs.status import Status
from bench.runs.steady import STEADY_500, STEADY_2000
from bench.runs.watch import Watch
from bench.stack import StackError
from nexhb import log

SCENARIOS: Final[tuple[Plan, ...]] = (
    STEADY_500, STEADY_2000, Reconnect(), Kill(), Archive(), Overload(),
)  # fmt: skip
COMMANDS: Final[Mapping[str, Plan]] = {
    plan.name: plan
    for plan in (Archive(), Overload(), Import(), Outage(), Compare(), Curve(), Status(), Daemons(), Watch())
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if every limit was kept, 1 if not. Wrong usage ends with exit code 2."""
    parser = make_parser()
    args = parser.parse_args(words)
    try:
        return int(args.run(parser, args))
    except StackError as error:
        show(f"[red]{error}[/]")
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    load_command.add_load(commands.add_parser("load", help="send a load of your own to a daemon and judge it"))
    load_command.add_demo(commands.add_parser("demo", help="run a daemon and a simulated fleet, compare every row"))
    load_command.add_fleet(
        commands.add_parser("fleet", help="write device_id,alias,token of a fleet, for `nexhb devices import`")
    )
    every = commands.add_parser("all", help="run every scenario and write bench/results/")
    every.add_argument("--only", action="append", help="name of a scenario, or its beginning; may be repeated")
    runs = [(every, SCENARIOS)]
    runs += [(commands.add_parser(name, help=plan.title), (plan,)) for name, plan in COMMANDS.items()]
    for command, plans in runs:
        command.add_argument("--quick", action="store_true", help="a shorter run; results go to bench/results/quick/")
        command.add_argument("--out", type=Path, help="the folder of the results")
        command.set_defaults(run=_run, plans=plans)
    return parser


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    plans: Sequence[Plan] = args.plans
    if only := getattr(args, "only", None):
        plans = [each for each in plans if each.name.startswith(tuple(only))]
        if not plans:
            parser.error(f"no such scenario; the scenarios are {', '.join(each.name for each in args.plans)}")
    if args.quick:
        # a shorter run never replaces the published figures
        return execute([plan.quicker() for plan in plans], args.out or RESULTS / "quick")
    return execute(plans, args.out or RESULTS, None if args.out else PAGE)


def execute(plans: Sequence[Plan], out: Path, page: Path | None = None) -> int:
    """Run plans, each on a daemon of its own; show and write each finding. Return the exit code."""
    findings = []
    # log messages about the days that a run creates would only clutter the terminal
    log.setup("warning")
    for plan in plans:
        show(f"\n[bold]{plan.name}[/]  {plan.title}")
        # if the daemon fails, this scenario is broken and the next one still runs
        try:
            finding = plan.run(lambda text: show(f"  {text}"))
        except* StackError as group:
            broken = at_least("the run reached its end", 1, 0)
            finding = Finding(plan.name, plan.title, (broken,), {"failed": str(group.exceptions[0])})
        findings.append(finding)
        show(table_of(finding.figures, finding.verdicts))
        for table in (part for part in finding.page if part.startswith("|")):
            show(f"\n{table}")
        path = write(finding, out)
        if page is not None and finding.page:
            write_page(page, finding)
    place = f"Result in {path}." if len(findings) == 1 else f"Results in {out}, all of them in {out / 'summary.md'}."
    show(place)
    # printed last, so that it is seen without scrolling
    if number := sum(not verdict.ok for finding in findings for verdict in finding.verdicts):
        names = ", ".join(finding.name for finding in findings if not finding.ok)
        show(f"[red]{number} limit{'s' * (number > 1)} broken in {names}.[/]")
    if not all(is_quiet(finding.others_cores) for finding in findings):
        show(NOT_QUIET)
    return 0 if all(finding.ok for finding in findings) else 1


if __name__ == "__main__":
    # SIGTERM ends the bench as Ctrl-C does: the daemon is stopped and its folder removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
