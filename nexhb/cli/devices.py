"""nexhb devices: who may send. Works beside a running daemon, which hears of it at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, TypeVar

import typer

from nexhb import cli, daemon
from nexhb import devices as store
from nexhb.cli import tables
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.texts import shown

_commands = typer.Typer(no_args_is_help=True, help="Who may send heartbeats.")
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


@_commands.command(help="Make a device and print its token, this once.")
def add(
    device_id: DeviceId,
    alias: Annotated[str | None, typer.Option(help="A name that people use.")] = None,
    as_json: cli.Json = False,
) -> None:
    _show_token(device_id, cli.run(_with_connection(lambda conn: store.add(conn, device_id, alias))), as_json)


@_commands.command(
    help="Give a device a new token, print it once, to be put into the device; the old ones stop working at once."
)
def rotate(device_id: DeviceId, as_json: cli.Json = False) -> None:
    _show_token(device_id, cli.run(_with_connection(lambda conn: store.rotate(conn, device_id))), as_json)


@_commands.command(
    help="Answer a device 410 from now on. By mistake: `readmit`; `rotate` only where the token itself must go."
)
def revoke(device_id: DeviceId, as_json: cli.Json = False) -> None:
    cli.run(_with_connection(lambda conn: store.revoke(conn, device_id, daemon.utc_now())))
    if as_json:
        cli.show({"device_id": device_id, "revoked": True})
    else:
        typer.echo(f"{device_id} is revoked.")


@_commands.command(
    help="""
    Take `revoke` back: the device goes on at once with the token that it has. One revoked on its own stays so.
    """
)
def readmit(device_id: DeviceId, as_json: cli.Json = False) -> None:
    done = cli.run(_with_connection(lambda conn: store.readmit(conn, device_id)))
    if as_json:
        cli.show({"device_id": device_id, "revoked": False, **done._asdict()})
        return
    found = "is admitted again" if done.was_revoked else "is not revoked"
    remedy = "" if done.tokens else " `nexhb devices rotate` gives it one."
    typer.echo(f"{device_id} {found}: {done.tokens} of its tokens work.{remedy}")


@_commands.command(
    name="import",
    help="""
    Take devices and their tokens from a CSV file, as spreadsheets write it: all of it or, where a line is bad, nothing.
    Idempotent.
    """,
)
def import_file(
    file: Annotated[
        Path, typer.Argument(help="CSV with device_id, token or token_sha256 (NexMDM's token_id), and alias or name.")
    ],
    as_json: cli.Json = False,
) -> None:
    if not file.is_file():
        raise BadInput(f"there is no file {file}.")
    done = cli.run(_with_connection(lambda conn: store.import_csv(conn, file)))
    if as_json:
        cli.show({name: value for name, value in asdict(done).items() if value != ""})
        return
    if done.found:
        typer.echo(f"Found {shown(done.found)}.")
    typer.echo(f"{done.rows} rows: {done.devices_made} devices made, {done.tokens_added} tokens added.")
    if done.rows_of_revoked:
        typer.echo(f"{done.rows_of_revoked} rows are of revoked devices, which hear 410 until `nexhb devices readmit`.")


@_commands.command(name="list", help="List devices by id. Tokens are never shown: only their hashes are stored.")
def list_devices(
    limit: Annotated[int | None, typer.Option(min=1, help="How many; all unless given.")] = None,
    after: Annotated[str, typer.Option(help="From behind this id.")] = "",
    as_json: cli.Json = False,
) -> None:
    rows, following = cli.run(_with_connection(lambda conn: _pages(conn, after, limit)))
    if as_json:
        cli.show({"devices": rows, "next": following})
        return
    columns = ("device_id", "name", "alias", "model", "last heartbeat", "revoked")
    tables.show(columns, (_cells(row) for row in rows))
    if following is not None:
        typer.echo(f"There are more: nexhb devices list --after {quote(following)}", err=True)


async def _pages(conn: Connection, after: str, limit: int | None) -> tuple[list[dict[str, Any]], str | None]:
    """Devices from behind `after`, and the last one's id where there are more than `limit`."""
    rows: list[dict[str, Any]] = []
    while True:
        wanted = PAGE if limit is None else min(PAGE, limit + 1 - len(rows))
        page = await store.page(conn, rows[-1]["device_id"] if rows else after, wanted)
        rows += [dict(row) for row in page]
        if limit is not None and len(rows) > limit:
            return rows[:limit], rows[limit - 1]["device_id"]
        if len(page) < wanted:
            return rows, None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    last = f"{row['last_ts']:%Y-%m-%d %H:%M:%SZ}" if row["last_ts"] else "never"
    texts = (row[column] or "" for column in ("name", "alias", "model"))
    return row["device_id"], *texts, last, "revoked" if row["revoked_at"] else ""


@_commands.command(
    name="enrolment-key",
    help="""
    Issue a key with which devices register themselves (auth.enrolment = "open"); printed this once.
    """,
)
def enrolment_key(
    uses: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many devices may register with it.")] = 1,
    hours: Annotated[int, typer.Option(min=1, max=8784, help="How long it holds.")] = 168,
    note: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    as_json: cli.Json = False,
) -> None:
    expires_at = daemon.utc_now() + timedelta(hours=hours)
    key = cli.run(_with_connection(lambda c: store.issue_enrolment_key(c, note=note, uses=uses, expires_at=expires_at)))
    if as_json:
        cli.show({"enrolment_key": key, "uses": uses, "expires_at": expires_at})
    else:
        typer.echo(key)
