"""nexhb doctor: is all well?"""

from __future__ import annotations

import asyncpg
import typer

from nexhb import __version__, cli, cluster, daemon, keys
from nexhb import doctor as practice
from nexhb.cli.asking import Heard, ask
from nexhb.config import Settings
from nexhb.errors import ConfigError, NexhbError


async def _visit(settings: Settings) -> list[practice.Line]:
    serves = daemon_line(await ask(settings, None, keys.read(settings)), configured=settings.server.port != 0)
    try:
        async with cluster.open_connection(
            settings, application="nexhb doctor", command_timeout_s=30, lock_timeout="5000"
        ) as conn:
            return [serves, *await practice.examine(conn, settings, daemon.utc_now())]
    except ConfigError:
        raise
    except (NexhbError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        return [serves, practice.Line("database", False, f"{error}", "docs/runbook.md#nexhbnotready")]


def daemon_line(heard: Heard, *, configured: bool) -> practice.Line:
    """Whether the daemon of this configuration serves, and whether it is of this version."""
    if not configured:
        return practice.Line("daemon", True, "not asked: server.port is 0, so its port is not known here")
    if not heard.reachable:
        said = f"{heard.url} does not answer: {' '.join(heard.reasons)}"
        return practice.Line("daemon", False, said, "nexhb serve, or systemctl restart nexhb")
    if not heard.ready:
        return practice.Line("daemon", False, f"{heard.url} is not ready: {' '.join(heard.reasons)}", "mend the reason")
    if heard.version != __version__:
        said = f"{heard.url} is ready, but runs nexhb {heard.version}, and this command is {__version__}"
        return practice.Line("daemon", False, said, "systemctl restart nexhb, or call the daemon's own nexhb")
    if heard.remarks:
        said = f"{heard.url} is ready. {' '.join(heard.remarks)}".replace(" Run nexhb doctor.", "")
        return practice.Line("daemon", False, said, "the lines `database copy` and `NexMDM`; its log says more")
    return practice.Line("daemon", True, f"{heard.url} is ready, nexhb {heard.version}")


@cli.app.command(
    help="""
    A line a question, good or bad, with what mends it. Exit code 1 where one is bad: made for cron.

    It asks the daemon whether it is ready, and judges the database and what lies in it, also while the daemon is
    stopped.
    """
)
def doctor(as_json: cli.Json = False) -> None:
    lines = cli.run(_visit(cli.settings()))
    if as_json:
        cli.show(practice.shown(lines))
    else:
        for line in lines:
            typer.echo(f"{'good' if line.good else 'BAD '}  {line.name:15}  {line.said}")
            if not line.good and line.remedy:
                typer.echo(f"{'':23}→ {line.remedy}")
    raise typer.Exit(0 if all(line.good for line in lines) else cli.EXIT_FAILED)
