"""nexhb serve: the daemon in the foreground."""

from __future__ import annotations

import sys

import typer

from nexhb import cli, daemon, keys


def _say(running: daemon.Running) -> None:
    """What a person at a terminal wants to know first. A log collector gets the same from daemon.started."""
    if not sys.stdout.isatty() and not sys.stderr.isatty():
        return
    where = running.settings.data_dir
    lines = [
        "",
        f"  nexhb serves {running.url}",
        f"  Data:       {where if running.embedded else 'the PostgreSQL of database.url'}",
        f"  Admin key:  {where / keys.FILE}" if running.settings.auth.admin_key is None else "",
        "",
        "  A first heartbeat, from another terminal in this folder:",
        "    TOKEN=$(.venv/bin/nexhb devices add kiosk-1)",
        f"""    curl -sS {running.url}/v1/heartbeat -H "Authorization: Bearer $TOKEN" \\""",
        """      -H 'Content-Type: application/json' \\""",
        """      -d '{"device_id":"kiosk-1","timestamp_utc":"'$(date -u +%FT%TZ)'","battery":{"pct":87.0}}'""",
        f"""    curl -sS {running.url}/v1/devices/kiosk-1 -H "x-admin: $(cat {where / keys.FILE})\"""",
        "",
        "  Ctrl-C stops it. Nothing that was acknowledged is lost.",
        "",
    ]
    typer.echo("\n".join(lines), err=True)


@cli.app.command()
def serve() -> None:
    """Run the daemon in the foreground."""
    raise typer.Exit(cli.run(daemon.serve(cli.settings(for_daemon=True), _say)))
