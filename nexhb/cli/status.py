"""nexhb status: what the running daemon says of itself."""

from __future__ import annotations

from typing import Annotated, Any

import aiohttp
import typer

from nexhb import cli, keys
from nexhb.errors import NexhbError


class _NotRunning(NexhbError):
    sentence = "The daemon does not answer."


async def _ask(url: str, admin_key: str | None) -> dict[str, Any]:
    headers = {"x-admin": admin_key} if admin_key else {}
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with aiohttp.ClientSession(base_url=url, headers=headers, timeout=timeout) as session:
            async with session.get("/readyz") as response:
                found: dict[str, Any] = {"url": url, **await response.json()}
            if admin_key:
                async with session.get("/v1/fleet") as response:
                    answer = await response.json()
                    found["fleet"] = answer if response.ok else {"error": answer.get("detail")}
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise _NotRunning(f"{url}: {error}.", hint="`nexhb serve` runs it; --url names another address.") from error
    return found


@cli.app.command(
    help="Is it ready, and how is the fleet? Exit code 1 where it is not ready, or the fleet cannot be read."
)
def status(
    url: Annotated[str | None, typer.Option(help="Where the daemon listens; else as configured.")] = None,
    as_json: cli.Json = False,
) -> None:
    settings = cli.settings()
    where = url or f"http://{settings.server.host}:{settings.server.port}"
    found = cli.run(_ask(where, keys.read(settings)))
    if as_json:
        cli.show(found)
    else:
        typer.echo(f"{where}: {'ready' if found['ready'] else 'NOT READY'}")
        for reason in found["reasons"]:
            typer.echo(f"  {reason}")
        for name, value in found.get("fleet", {}).items():
            typer.echo(f"  {name}: {value}")
        if "fleet" not in found:
            typer.echo(f"  fleet: not shown, there is no admin key in the configuration nor in {settings.data_dir}")
    well = found["ready"] and "error" not in found.get("fleet", {})
    raise typer.Exit(0 if well else cli.EXIT_FAILED)
