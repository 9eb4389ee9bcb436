"""The import rules in pyproject.toml hold and detect violations; `make lint` checks them too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `lint-imports` like `make lint`, on the checkout in `folder`."""
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    found = lint_imports(HOUSE)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("room", "line", "rule"),
    [
        ("ingest/writer.py", "import nexhb.http.transport.problem", "Layers:"),
        ("partitions.py", "import nexhb.devices.registry", "Layers:"),
        ("jobs/runner.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nexhb.http.app", "Layers:"),
        ("ingest/parser.py", "import time", "Pure modules"),
        ("ingest/batch.py", "import asyncpg", "Pure modules"),
        ("ingest/intake.py", "import aiohttp", "Modules below http"),
        ("postgres/connections.py", "import tests.conftest", "The package imports"),
        ("archive/store.py", "import nexhb.archive.file", "Layers of archive"),
        ("http/operator_api/fleet.py", "import nexhb.http.device_api.admission", "Layers of http"),
        ("http/transport/body.py", "import nexhb.http.credentials", "Layers of http"),
        ("http/device_api/fast_path.py", "import nexhb.http.device_api.heartbeats", "Layers of the devices' API"),
        ("http/operator_api/ops.py", "import nexhb.http.operator_api.fleet", "Layers of the operators' API"),
        ("http/transport/connections.py", "import nexhb.http.transport.handshake", "Layers of transport"),
        ("http/cellar.py", "", "Layers of http"),
        ("cellar.py", "", "Layers:"),
    ],
)
def test_an_import_that_breaks_the_rules_is_detected(tmp_path: Path, room: str, line: str, rule: str) -> None:
    shutil.copytree(HOUSE / "nexhb", tmp_path / "nexhb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOUSE / "pyproject.toml", tmp_path)
    with (tmp_path / "nexhb" / room).open("a") as file:
        file.write(f"\n{line}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert any(one.startswith(rule) and " BROKEN" in one for one in found.stdout.splitlines())
    assert f"nexhb.{room.removesuffix('.py').replace('/', '.')}" in found.stdout
