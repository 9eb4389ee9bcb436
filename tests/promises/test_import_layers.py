"""Imports run one way through the house; the rules stand in pyproject.toml, and `make lint` runs them too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` as `make lint` runs it, over the checkout in `folder`."""
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    found = lint_imports(HOUSE)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("room", "line", "rule"),
    [
        ("writer.py", "import nexhb.http.problem", "One way through the house"),
        ("reads.py", "import nexhb.devices", "One way through the house"),
        ("wire.py", "import time", "Pure rooms"),
        ("batch.py", "import asyncpg", "Pure rooms"),
        ("intake.py", "import aiohttp", "Below http"),
        ("db.py", "import tests.conftest", "Nothing that ships"),
        ("cellar.py", "", "One way through the house"),
    ],
)
def test_an_import_against_the_rules_is_found(tmp_path: Path, room: str, line: str, rule: str) -> None:
    shutil.copytree(HOUSE / "nexhb", tmp_path / "nexhb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOUSE / "pyproject.toml", tmp_path)
    with (tmp_path / "nexhb" / room).open("a") as file:
        file.write(f"\n{line}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert any(one.startswith(rule) and " BROKEN" in one for one in found.stdout.splitlines())
    assert f"nexhb.{room.removesuffix('.py')}" in found.stdout
