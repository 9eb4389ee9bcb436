"""nexhb flags: show and change feature flags. Works beside running daemons, where a change takes effect at once."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from nexhb import cli, clock
from nexhb.errors import BadInput
from nexhb.postgres.connections import Connection
from nexhb.reading import flags as store
from nexhb.reading.flags import Flags, Value

_commands = typer.Typer(invoke_without_command=True, help="Show the flags and their last changes.")
cli.app.add_typer(_commands, name="flags")
T = TypeVar("T")

CHANGES_SHOWN = 10
Changes = Annotated[int, typer.Option("--changes", min=1, max=10_000, help="How many of the last changes to show.")]
_WORDS = {"on": True, "true": True, "off": False, "false": False}


async def _with_connection(work: Callable[[Connection, Flags], Awaitable[T]]) -> T:
    settings = cli.settings()
    async with cli.opened_connection(settings, application="nexhb flags", lock_timeout="10000") as conn:
        return await work(conn, store.first_values(settings.reads))


@_commands.callback(help="Show the flags and their last changes. `set` changes flags in every daemon at once.")
def show(context: typer.Context, changes: Changes = CHANGES_SHOWN, as_json: cli.Json = False) -> None:
    if context.invoked_subcommand is None:
        _show(*cli.run(_with_connection(lambda conn, first: _read(conn, first, changes))), as_json)


async def _read(
    conn: Connection, first: Flags, max_changes: int = CHANGES_SHOWN
) -> tuple[Flags, list[dict[str, Any]], bool]:
    """Return the flags, their last changes, and whether there are older changes."""
    changes = await store.last_changes(conn, max_changes + 1)
    return await store.read(conn, first), changes[:max_changes], len(changes) > max_changes


@_commands.command(
    name="set", help="Change flags in every daemon: `nexhb flags set read_from_last_status=off` is the kill switch."
)
def set_flags(
    changes: Annotated[list[str], typer.Argument(metavar="FLAG=VALUE …", help="on, off, or a percentage.")],
    as_json: cli.Json = False,
) -> None:
    values = dict(_parse(text) for text in changes)

    async def work(conn: Connection, first: Flags) -> tuple[Flags, list[dict[str, Any]], bool]:
        await store.change(conn, values, _changed_by(), clock.system_now(), first)
        return await _read(conn, first)

    _show(*cli.run(_with_connection(work)), as_json)


def _parse(text: str) -> tuple[str, Value]:
    flag, _, word = text.partition("=")
    value: object = int(word) if word.isascii() and word.isdigit() else _WORDS.get(word.lower(), word)
    try:
        return flag, store.check(flag, value)
    except ValueError as error:
        reason = str(error).replace("true or false", "on or off")
        raise BadInput(f"{text}: {reason}.") from None


def _changed_by() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user of a container may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def _show(flags: Flags, changes: list[dict[str, Any]], has_more: bool, as_json: bool) -> None:
    if as_json:
        cli.show({**flags.shown(), "changes": changes, "more_changes": has_more})
        return
    for flag, value in flags.shown().items():
        typer.echo(f"{flag:22} {_word(value)}")
    for change in changes:
        at, old, new = f"{change['at']:%Y-%m-%d %H:%M:%SZ}", _word(change["from"]), _word(change["to"])
        typer.echo(f"  {at}  {change['flag']}: {old} → {new}, {change['by']}")
    if has_more:
        typer.echo(f"  There are older changes: nexhb flags --changes {10 * len(changes)}")


def _word(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value} %"
