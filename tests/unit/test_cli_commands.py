"""Each command imports only the files that it needs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

from nexhb import cli


def module_of(command: Any) -> Any:
    """Return the module that defines a command, or the first command of a group."""
    first = next(iter(command.commands.values())) if isinstance(command, typer.core.TyperGroup) else command
    return first.callback.__module__


def test_every_command_is_listed_with_the_file_that_registers_it() -> None:
    cli.register()
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert {name: module_of(command) for name, command in group.commands.items()} == {
        name: f"nexhb.cli.{module}" for name, module in cli.COMMANDS.items()
    }


def test_a_command_runs_without_the_files_of_the_others() -> None:
    command = [sys.executable, "-m", "nexhb", "partitions", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, " partitions " in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["status"], "status"),
        (["--config", "status", "devices", "list"], "devices"),
        (["--config=status", "flags"], "flags"),
        (["--version"], None),
        (["--config"], None),
        ([], None),
    ],
)
def test_a_command_after_options_is_recognized(words: list[str], command: str | None) -> None:
    assert cli._command(words) == command


def test_status_imports_neither_the_driver_of_the_database_nor_an_http_server_nor_the_daemon() -> None:
    """Formerly, `nexhb status` took 0.9 s of CPU, most of it to import the files of other commands and aiohttp."""
    code = "import nexhb.cli as cli, sys; cli.register('status'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unused = {"asyncpg", "aiohttp", "nexhb.daemon", "nexhb.ingest.writer", "nexhb.doctor", "aioboto3"}
    assert not unused & set(done.stdout.split())
