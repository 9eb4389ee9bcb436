"""`make install`, into a folder of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"  # not one that lies in a private home

pytestmark = [
    pytest.mark.skipif(
        subprocess.run([PYTHON, "-c", "import ensurepip"], capture_output=True, check=False).returncode != 0
        if Path(PYTHON).exists()
        else True,
        reason=f"no {PYTHON} with ensurepip here: apt-get install python3-venv",
    ),
]


def make(target: str, destination: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """As a packager calls it, but without what nexhb depends on."""
    words = [target, f"DESTDIR={destination}", f"PYTHON={PYTHON}", "LOCK=/dev/null", *more]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["make", "-C", HOUSE, *words], env=environment, capture_output=True, text=True, check=check, timeout=200
    )


def test_it_installs_twice_keeps_what_is_an_operators_and_leaves_it_when_it_goes(tmp_path: Path) -> None:
    said = make("install", tmp_path, "PREFIX=/opt/other").stdout
    assert "systemctl enable --now nexhb" in said
    prefix, units, etc = tmp_path / "opt" / "other", tmp_path / "etc" / "systemd" / "system", tmp_path / "etc" / "nexhb"
    assert (prefix / "bin" / "nexhb").read_text().startswith("#!/opt/other/bin/python")
    [package] = prefix.glob("lib/python3*/site-packages/nexhb")
    assert (package / "sql" / "schema.sql").exists()
    for unit in ("nexhb.service", "nexhb@.service"):
        text = (units / unit).read_text()
        assert "ExecStart=/opt/other/bin/nexhb serve" in text
        assert "/opt/nexhb" not in text
    config, credentials = etc / "nexhb.toml", etc / "credentials"
    assert config.read_text() == (HOUSE / "config.example.toml").read_text()
    assert (config.stat().st_mode & 0o777, credentials.stat().st_mode & 0o777) == (0o640, 0o700)

    config.write_text("mine")
    (credentials / "admin_key").write_text("mine too")
    (units / "nexhb.service").write_text("an older one")
    make("install", tmp_path, "PREFIX=/opt/other")
    assert config.read_text() == "mine"
    assert "/opt/other/bin/nexhb" in (units / "nexhb.service").read_text()

    make("uninstall", tmp_path, "PREFIX=/opt/other")
    make("uninstall", tmp_path, "PREFIX=/opt/other")
    assert not prefix.exists()
    assert list(units.iterdir()) == []
    assert (config.read_text(), (credentials / "admin_key").read_text()) == ("mine", "mine too")


def test_a_python_in_a_private_home_is_refused_and_a_mistyped_prefix_costs_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *realpath*) echo /home/somebody/bin/python3;; esac\n')
    python.chmod(0o755)
    found = make("install", tmp_path, f"PYTHON={python}", check=False)
    assert found.returncode != 0
    assert "the user nexhb cannot go" in found.stderr
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "precious").touch()
    make("uninstall", tmp_path, "PREFIX=/usr")
    assert (tmp_path / "usr" / "precious").exists()
    assert make("install", tmp_path, "PREFIX=relative", check=False).returncode != 0
