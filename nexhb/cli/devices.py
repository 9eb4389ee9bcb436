"""nexhb devices: manage devices and their tokens. Works beside a running daemon, which is notified at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, TypeVar
from urllib.parse import quote as quote_path

import typer

from nexhb import cli, clock
from nexhb.cli import tables
from nexhb.cli.daemon_client import call
from nexhb.devices import csv_import, enrolment, registry
from nexhb.errors import BadInput
from nexhb.postgres.connections import Connection
from nexhb.texts import quoted, shown

_commands = typer.Typer(no_args_is_help=True, help="Manage devices, their tokens and enrolment keys.")
cli.app.add_typer(_commands, name="devices")
T = TypeVar("T")

PAGE = 5_000

DeviceId = Annotated[str, typer.Argument(metavar="ID", help="The device's id, up to 100 characters.")]


async def _with_connection(work: Callable[[Connection], Awaitable[T]]) -> T:
    async with cli.opened_connection(cli.settings(), application="nexhb devices", lock_timeout="10000") as conn:
        return await work(conn)


def _show_token(device_id: str, token: str, as_json: bool) -> None:
    if as_json:
        cli.show({"device_id": device_id, "device_token": token})
    else:
        typer.echo(token)


@_commands.command(help="Add a device and print its token. The token cannot be shown again.")
def add(
    device_id: DeviceId,
    alias: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    as_json: cli.Json = False,
) -> None:
    _show_token(device_id, cli.run(_with_connection(lambda conn: registry.add(conn, device_id, alias))), as_json)


@_commands.command(
    help="Give a device a new token and print it. It cannot be shown again; the old tokens stop working at once."
)
def rotate(device_id: DeviceId, as_json: cli.Json = False) -> None:
    _show_token(device_id, cli.run(_with_connection(lambda conn: registry.rotate(conn, device_id))), as_json)


@_commands.command(
    help="Reject a device with 410 from now on. `readmit` undoes it; to replace the token, use `rotate`."
)
def revoke(device_id: DeviceId, as_json: cli.Json = False) -> None:
    cli.run(_with_connection(lambda conn: registry.revoke(conn, device_id, clock.system_now())))
    if as_json:
        cli.show({"device_id": device_id, "revoked": True})
    else:
        typer.echo(f"{device_id} is revoked.")


@_commands.command(
    help="""
    Undo `revoke`: the device is accepted again at once with the token it has. A token that was revoked on its own stays
    revoked.
    """
)
def readmit(device_id: DeviceId, as_json: cli.Json = False) -> None:
    done = cli.run(_with_connection(lambda conn: registry.readmit(conn, device_id)))
    if as_json:
        cli.show({"device_id": device_id, "revoked": False, **done._asdict()})
        return
    state = "is readmitted" if done.was_revoked else "is not revoked"
    remedy = "" if done.tokens else " `nexhb devices rotate` gives it one."
    typer.echo(f"{device_id} {state}: {done.tokens} of its tokens work.{remedy}")


@_commands.command(
    name="set",
    help="Change the site, the tags or the name of a device. An option that is not given leaves its value "
    "unchanged. The command queries the running daemon.",
)
def set_device(  # noqa: PLR0917 - typer passes options by name
    device_id: DeviceId,
    site: Annotated[str | None, typer.Option(help="The id of its site.")] = None,
    no_site: Annotated[bool, typer.Option("--no-site", help="It has no site.")] = False,
    tag: Annotated[
        list[str] | None, typer.Option(help="A tag; repeat the option for several. Replaces all tags.")
    ] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="It has no tags.")] = False,
    name: Annotated[str | None, typer.Option(help="A name for people; empty: none.")] = None,
    as_json: cli.Json = False,
) -> None:
    if (no_site and site is not None) or (no_tags and tag):
        raise BadInput("--no-site excludes --site, and --no-tags excludes --tag.")
    values: dict[str, Any] = {}
    if no_site or site is not None:
        values["site"] = site
    if no_tags or tag:
        values["tags"] = tag or []
    if name is not None:
        values["name"] = name or None
    if not values:
        raise BadInput("nothing to change was given.", hint="Give --site, --no-site, --tag, --no-tags or --name.")
    done = cli.run(call(cli.settings(), "PATCH", f"/v1/devices/{quote_path(device_id, safe='')}", values))
    if as_json:
        cli.show({field: done[field] for field in ("device_id", "site", "tags", "name")})
    else:
        tags = ", ".join(done["tags"]) or "no tags"
        typer.echo(shown(f"{device_id}: {done['site'] or 'no site'}; {tags}; {done['name'] or 'no name'}."))


@_commands.command(
    name="import",
    help="""
    Import devices and their tokens from a CSV file, as spreadsheets write it. If a line is bad, nothing is imported.
    Idempotent.
    """,
)
def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with device_id, token or token_sha256 (NexMDM's token_id), alias or name, site, tags."
        ),
    ],
    as_json: cli.Json = False,
) -> None:
    if not file.is_file():
        raise BadInput(f"file {quoted(str(file))} not found.")
    done = cli.run(_with_connection(lambda conn: csv_import.import_csv(conn, file)))
    if as_json:
        cli.show({name: value for name, value in asdict(done).items() if value != ""})
        return
    if done.found:
        typer.echo(f"Found {shown(done.found)}.")
    typer.echo(f"{done.rows} rows: {done.devices_made} devices added, {done.tokens_added} tokens added.")
    if revoked := done.rows_of_revoked:
        typer.echo(f"{revoked} of the rows name revoked devices, which receive 410 until `nexhb devices readmit`.")


@_commands.command(name="list", help="List devices by id. Tokens are not shown: only their hashes are stored.")
def list_devices(
    limit: Annotated[int | None, typer.Option(min=1, help="The maximum number of devices; default: all.")] = None,
    after: Annotated[str, typer.Option(help="List devices whose id sorts after this one.")] = "",
    as_json: cli.Json = False,
) -> None:
    rows, following = cli.run(_with_connection(lambda conn: _pages(conn, after, limit)))
    if as_json:
        cli.show({"devices": rows, "next": following})
        return
    columns = ("device_id", "name", "alias", "site", "tags", "model", "last heartbeat", "revoked")
    tables.show(columns, (_cells(row) for row in rows))
    if following is not None:
        typer.echo(f"There are more: nexhb devices list --after {quote(following)}", err=True)


async def _pages(conn: Connection, after: str, limit: int | None) -> tuple[list[dict[str, Any]], str | None]:
    """Return up to `limit` devices after the id `after`, and the id of the last of them if there are more."""
    rows: list[dict[str, Any]] = []
    while True:
        page_limit = PAGE if limit is None else min(PAGE, limit + 1 - len(rows))
        page = await registry.page(conn, rows[-1]["device_id"] if rows else after, page_limit)
        rows += [dict(row) for row in page]
        if limit is not None and len(rows) > limit:
            return rows[:limit], rows[limit - 1]["device_id"]
        if len(page) < page_limit:
            return rows, None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    last = f"{row['last_ts']:%Y-%m-%d %H:%M:%SZ}" if row["last_ts"] else "never"
    name, alias, site, model = (row[column] or "" for column in ("name", "alias", "site", "model"))
    tags = " ".join(row["tags"])
    return row["device_id"], name, alias, site, tags, model, last, "revoked" if row["revoked_at"] else ""


@_commands.command(
    name="enrolment-key",
    help="""
    Issue a key with which devices register themselves (auth.enrolment = "open"). It cannot be shown again.
    """,
)
def enrolment_key(
    uses: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many devices may register with the key.")] = 1,
    hours: Annotated[int, typer.Option(min=1, max=8784, help="How long the key is valid.")] = 168,
    note: Annotated[str | None, typer.Option(help="A note on what the key is for.")] = None,
    site: Annotated[str | None, typer.Option(help="The id of the site of the devices that register with it.")] = None,
    as_json: cli.Json = False,
) -> None:
    expires_at = clock.system_now() + timedelta(hours=hours)

    async def issue(conn: Connection) -> str:
        return await enrolment.issue_enrolment_key(conn, note=note, uses=uses, expires_at=expires_at, site=site)

    key = cli.run(_with_connection(issue))
    if as_json:
        cli.show({"enrolment_key": key, "uses": uses, "expires_at": expires_at})
    else:
        typer.echo(key)
