"""nexhb doctor: check the daemon, its database and what is stored there."""

from __future__ import annotations

import asyncpg
import typer

from nexhb import __version__, cli, clock, keys
from nexhb.cli.daemon_client import DaemonStatus, query_daemon
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.doctor.check import CheckResult
from nexhb.errors import ConfigError, NexhbError
from nexhb.postgres import cluster


async def _run_checks(settings: Settings) -> list[CheckResult]:
    status = await query_daemon(settings, None, keys.read(settings))
    daemon = check_daemon(status, configured=settings.server.port != 0)
    try:
        async with cluster.open_connection(
            settings, application="nexhb doctor", command_timeout_s=30, lock_timeout="5000"
        ) as conn:
            return [daemon, *await checks.run_checks(conn, settings, clock.system_now())]
    except ConfigError:
        raise
    except (NexhbError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        return [daemon, CheckResult("database", False, f"{error}", "docs/runbook.md#nexhbnotready")]


def check_daemon(status: DaemonStatus, *, configured: bool) -> CheckResult:
    """Check that the daemon of this configuration is ready and has the version of this command."""
    if not configured:
        return CheckResult("daemon", True, "not checked: server.port is 0, so the port is not known here")
    if not status.reachable:
        detail = f"{status.url} does not answer: {' '.join(status.reasons)}"
        return CheckResult("daemon", False, detail, "nexhb serve, or systemctl restart nexhb")
    if not status.ready:
        detail = f"{status.url} is not ready: {' '.join(status.reasons)}"
        return CheckResult("daemon", False, detail, "remove the cause")
    if status.version != __version__:
        detail = f"{status.url} is ready, but runs nexhb {status.version}, and this command is {__version__}"
        return CheckResult("daemon", False, detail, "systemctl restart nexhb, or call the daemon's own nexhb")
    if status.remarks:
        detail = f"{status.url} is ready. {' '.join(status.remarks)}".replace(" Run nexhb doctor.", "")
        remedy = "see the lines `database copy` and `NexMDM`, and the daemon's log"
        return CheckResult("daemon", False, detail, remedy)
    return CheckResult("daemon", True, f"{status.url} is ready, nexhb {status.version}")


@cli.app.command(
    help="""
    Print one line for each check, with a remedy where it failed. Exit code 1 if a check failed, so that cron can run
    this command.

    It asks the daemon whether it is ready, and checks the database and what is stored there, also while the daemon is
    stopped.
    """
)
def doctor(as_json: cli.Json = False) -> None:
    results = cli.run(_run_checks(cli.settings()))
    if as_json:
        cli.show(checks.as_json(results))
    else:
        for result in results:
            typer.echo(f"{'good' if result.passed else 'BAD '}  {result.name:15}  {result.detail}")
            if not result.passed and result.remedy:
                typer.echo(f"{'':23}→ {result.remedy}")
    raise typer.Exit(0 if all(result.passed for result in results) else cli.EXIT_FAILED)
