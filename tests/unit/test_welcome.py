"""The welcome of `nexhb serve` at a terminal: the commands that it prints reach this daemon from any other terminal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nexhb import config, daemon
from nexhb.cli import serve
from nexhb.config import Settings


def said(data_dir: Path) -> str:
    """Return the welcome of a daemon with this data_dir."""
    running = SimpleNamespace(url="http://127.0.0.1:8080", embedded=True, settings=Settings(data_dir=data_dir))
    return "\n".join(serve.welcome_lines(cast("daemon.Running", running)))


def test_the_default_folder_is_not_named() -> None:
    assert "TOKEN=$(.venv/bin/nexhb devices add kiosk-1)" in said(config.default_data_dir({}))


def test_another_folder_is_named_and_quoted() -> None:
    assert "TOKEN=$(NEXHB_DATA_DIR=/mnt/kiosks .venv/bin/nexhb devices add" in said(Path("/mnt/kiosks"))
    assert "$(NEXHB_DATA_DIR='/mnt/my kiosks' .venv/bin/nexhb devices add" in said(Path("/mnt/my kiosks"))
    assert "$(cat '/mnt/my kiosks/admin_key')" in said(Path("/mnt/my kiosks"))
    assert f"NEXHB_DATA_DIR={Path.cwd() / 'here'} " in said(Path("here"))


def test_a_folder_set_by_this_terminals_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIRECTORY", "NEXHB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/mnt/state")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert Settings().data_dir == Path("/mnt/state/nexhb")
    assert "NEXHB_DATA_DIR=/mnt/state/nexhb " in said(Settings().data_dir)
