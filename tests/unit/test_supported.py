from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nexhb import supported
from nexhb.errors import UnsupportedLibrary

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


@pytest.mark.parametrize("version", ["3.15.0", "3.15.0b1", "4.0", "3.14.4", "2.9.9", "", "unknown"])
def test_an_unsupported_release_is_refused_by_name(version: str) -> None:
    with pytest.raises(UnsupportedLibrary) as refused:
        supported.check("aiohttp", version)
    assert f"aiohttp {version} is installed, nexhb supports 3.14.5 and newer before 3.15." in str(refused.value)
    assert "pip install 'aiohttp>=3.14.5,<3.15'" in str(refused.value)


@pytest.mark.parametrize("version", ["3.14.5", "3.14.6", "3.14.10", "3.14.5+local", "3.14.99.dev1"])
def test_a_release_of_the_same_minor_version_is_accepted(version: str) -> None:
    supported.check("aiohttp", version)


def test_the_supported_releases_agree_with_pyproject() -> None:
    declared = PYPROJECT["project"]["dependencies"]
    assert {f"{name}>={first},<{end}" for name, (first, end) in supported.SUPPORTED.items()} <= set(declared)


@pytest.mark.parametrize("library", sorted(supported.SUPPORTED))
def test_the_daemon_does_not_start_if_a_library_is_too_new(library: str) -> None:
    program = f"import {library}; {library}.__version__ = '99.1'; from nexhb.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "serve"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr.startswith("nexhb: ")
    assert f"{library} 99.1 is installed" in result.stderr
    assert "Traceback" not in result.stderr
