"""nexhb flags: what is switched on, and by whom. Works beside running daemons, which hear of a change at once."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from nexhb import cli, daemon
from nexhb import flags as store
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.flags import Flags, Value

_commands = typer.Typer(invoke_without_command=True, help="What is switched on; `set` changes it, at once everywhere.")
cli.app.add_typer(_commands, name="flags")
T = TypeVar("T")

CHANGES_SHOWN = 10
Changes = Annotated[int, typer.Option("--changes", min=1, max=10_000, help="How many of the last changes to show.")]
_WORDS = {"on": True, "true": True, "off": False, "false": False}


async def _with_connection(work: Callable[[Connection, Flags], Awaitable[T]]) -> T:
    settings = cli.settings()
    async with cli.opened_connection(settings, application="nexhb flags", lock_timeout="10000") as conn:
        return await work(conn, store.first_values(settings.reads))


@_commands.callback(help="The flags, and who changed them last.")
def show(context: typer.Context, changes: Changes = CHANGES_SHOWN, as_json: cli.Json = False) -> None:
    if context.invoked_subcommand is None:
        _show(*cli.run(_with_connection(lambda conn, first: _look(conn, first, changes))), as_json)


async def _look(conn: Connection, first: Flags, shown: int = CHANGES_SHOWN) -> tuple[Flags, list[dict[str, Any]], bool]:
    """The flags, their last changes, and whether there are older ones."""
    changes = await store.last_changes(conn, shown + 1)
    return await store.read(conn, first), changes[:shown], len(changes) > shown


@_commands.command(
    name="set", help="Change flags in every daemon: `nexhb flags set read_from_last_status=off` is the kill switch."
)
def set_flags(
    changes: Annotated[list[str], typer.Argument(metavar="FLAG=VALUE …", help="on, off, or a number of percent.")],
    as_json: cli.Json = False,
) -> None:
    wanted = dict(_parsed(text) for text in changes)

    async def work(conn: Connection, first: Flags) -> tuple[Flags, list[dict[str, Any]], bool]:
        await store.change(conn, wanted, _who(), daemon.utc_now(), first)
        return await _look(conn, first)

    _show(*cli.run(_with_connection(work)), as_json)


def _parsed(text: str) -> tuple[str, Value]:
    flag, _, given = text.partition("=")
    value: object = int(given) if given.isascii() and given.isdigit() else _WORDS.get(given.lower(), given)
    try:
        return flag, store.check(flag, value)
    except ValueError as error:
        said = str(error).replace("true or false", "on or off")
        raise BadInput(f"{text}: {said}.") from None


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def _show(flags: Flags, changes: list[dict[str, Any]], more: bool, as_json: bool) -> None:
    if as_json:
        cli.show({**flags.shown(), "changes": changes, "more_changes": more})
        return
    for flag, value in flags.shown().items():
        typer.echo(f"{flag:22} {_word(value)}")
    for one in changes:
        typer.echo(
            f"  {one['at']:%Y-%m-%d %H:%M:%SZ}  {one['flag']}: {_word(one['from'])} → {_word(one['to'])}, {one['by']}"
        )
    if more:
        typer.echo(f"  and older ones: nexhb flags --changes {10 * len(changes)}")


def _word(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value} %"
