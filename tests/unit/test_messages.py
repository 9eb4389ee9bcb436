"""What a person reads does not depend on how Python was started."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import nexhb
from nexhb.errors import NexhbError

SAY_ALL = """
import sys, typer.main
from nexhb import cli
from nexhb.errors import BadInput, NexhbError
cli.register()
def walk(command, name):
    print(name, "|", command.help)
    for part, one in getattr(command, "commands", {}).items():
        walk(one, f"{name} {part}")
walk(typer.main.get_command(cli.app), "nexhb")
print(BadInput("detail."), NexhbError(), sys.flags.optimize)
"""


def _errors(of: type[NexhbError]) -> Iterator[type[NexhbError]]:
    for one in of.__subclasses__():
        yield one
        yield from _errors(one)


def test_each_error_has_a_sentence_of_its_own() -> None:
    for module in pkgutil.walk_packages(nexhb.__path__, "nexhb."):
        if module.name != "nexhb.__main__":
            importlib.import_module(module.name)
    ours = [one for one in _errors(NexhbError) if one.__module__.startswith("nexhb.")]
    assert [one.__name__ for one in ours if "sentence" not in vars(one)] == []
    sentences = [one.sentence for one in ours]
    assert len(set(sentences)) == len(sentences) >= 17


def test_messages_and_help_are_the_same_with_docstrings_removed() -> None:
    """Formerly, PYTHONOPTIMIZE=2 removed the sentences of all errors, and the help of every command."""

    def said(level: str) -> list[str]:
        environment = os.environ | {"PYTHONOPTIMIZE": level, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", SAY_ALL], env=environment, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    plain, optimised = said(""), said("2")
    assert plain[-1] == "The input is not valid. detail. nexhb could not continue. 0"
    assert optimised == [*plain[:-1], plain[-1][:-1] + "2"]
    assert not [line for line in plain if line.endswith("| None")]
