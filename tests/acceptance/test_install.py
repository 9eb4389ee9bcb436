"""`make install`, into a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is unpacked from the built sdist: it installs as the checkout does."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(HOUSE)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    [archive] = folder.iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def make(
    target: str, destination: Path | str, *more: str, check: bool = True, source: Path = HOUSE
) -> subprocess.CompletedProcess[str]:
    """As a packager calls it, but without what nexhb depends on."""
    words = [target, f"DESTDIR={destination}", f"PYTHON={PYTHON}", "LOCK=/dev/null", *more]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["make", "-C", source, *words], env=environment, capture_output=True, text=True, check=check, timeout=200
    )


def files_that_name(path: Path, below: Path) -> list[Path]:
    """Files and links with this path in them."""
    wanted = str(path).encode()
    links = [one for one in below.rglob("*") if one.is_symlink() and wanted in str(one.readlink()).encode()]
    return links + [one for one in below.rglob("*") if one.is_file() and wanted in one.read_bytes()]


@pytest.mark.parametrize("destination", ["build", "a folder with blanks, and a long name " + "x" * 130])
def test_a_package_runs_where_it_is_installed_and_does_not_name_where_it_was_built(
    source: Path, tmp_path: Path, destination: str
) -> None:
    """The sdist had no CHANGELOG.md, so that `make install` failed; and a relative, a long or a spaced DESTDIR stood in
    the first lines of programs, in pyvenv.cfg, in activate, in compiled files and in direct_url.json."""
    prefix = tmp_path / "final" / "nexhb"
    make("install", destination, f"PREFIX={prefix}/", source=source)
    built = source / destination
    assert (built / prefix.relative_to("/")).is_dir()
    moved = tmp_path / "moved"
    built.rename(moved)
    assert files_that_name(source, moved) == []
    prefix.parent.mkdir()
    (moved / prefix.relative_to("/")).rename(prefix)
    assert (prefix / "bin" / "nexhb").read_text().startswith(f"#!{prefix}/bin/python")
    found = subprocess.run([prefix / "bin" / "pip", "show", "-f", "nexhb"], capture_output=True, text=True, check=True)
    assert f"Location: {prefix}/lib" in found.stdout
    assert f"command = {PYTHON} -m venv {prefix}" in (prefix / "pyvenv.cfg").read_text()
    activate = f'. {prefix}/bin/activate && command -v nexhb && python -c "import nexhb.errors; print(nexhb.__file__)"'
    found = subprocess.run(
        ["sh", "-c", activate], capture_output=True, text=True, check=True, cwd="/", env={"PATH": os.defpath}
    )
    [package] = prefix.glob("lib/python3*/site-packages/nexhb")
    assert found.stdout.split() == [f"{prefix}/bin/nexhb", f"{package}/__init__.py"]
    assert [*package.rglob("*.pyc")]  # whoever runs it may not write there
    assert not [*prefix.rglob("direct_url.json")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["DESTDIR=x", "PREFIX=/opt/my nexhb"], "PREFIX=/opt/my nexhb takes letters, digits and"),
        (["DESTDIR=x", "PREFIX=/opt/a|b"], "takes letters, digits and"),
        (["DESTDIR=x", "PREFIX=opt/nexhb"], "PREFIX=opt/nexhb takes an absolute path"),
        (["DESTDIR=x", "PREFIX=/opt/../nexhb"], "takes a path without .."),
        (["DESTDIR=a:b", "PREFIX=/opt/nexhb"], "DESTDIR=a:b takes a path without a colon"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_with_a_sentence(words: list[str], says: str) -> None:
    found = subprocess.run(["make", "-C", HOUSE, "install", *words], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert says in found.stderr


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
