"""`make install` into a separate folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"  # not a Python in a private home directory

pytestmark = [
    pytest.mark.skipif(
        subprocess.run([PYTHON, "-c", "import ensurepip"], capture_output=True, check=False).returncode != 0
        if Path(PYTHON).exists()
        else True,
        reason=f"{PYTHON} with ensurepip is not installed: apt-get install python3-venv",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and unpack the sdist, which must install like the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    [archive] = folder.iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def make(
    target: str, destination: Path | str, *more: str, check: bool = True, source: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run make as a packager does, but without nexhb's dependencies."""
    words = [target, f"DESTDIR={destination}", f"PYTHON={PYTHON}", "LOCK=/dev/null", *more]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["make", "-C", source, *words], env=environment, capture_output=True, text=True, check=check, timeout=200
    )


def files_that_contain(path: Path, folder: Path) -> list[Path]:
    """Return each file in the folder whose content contains this path, and each link whose target does."""
    text = str(path).encode()
    links = [one for one in folder.rglob("*") if one.is_symlink() and text in str(one.readlink()).encode()]
    return links + [one for one in folder.rglob("*") if one.is_file() and text in one.read_bytes()]


@pytest.mark.parametrize("destination", ["build", "a folder with blanks, and a long name " + "x" * 130])
def test_an_installed_package_runs_and_does_not_contain_the_path_of_its_build(
    source: Path, tmp_path: Path, destination: str
) -> None:
    """Formerly, the sdist lacked CHANGELOG.md, so `make install` failed. Also, a DESTDIR that was relative, long or had
    spaces remained in shebang lines, pyvenv.cfg, activate, compiled files and direct_url.json."""
    prefix = tmp_path / "final" / "nexhb"
    make("install", destination, f"PREFIX={prefix}/", source=source)
    built = source / destination
    assert (built / prefix.relative_to("/")).is_dir()
    moved = tmp_path / "moved"
    built.rename(moved)
    assert files_that_contain(source, moved) == []
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
    assert [*package.rglob("*.pyc")]  # the user who runs nexhb may not be allowed to write there
    assert not [*prefix.rglob("direct_url.json")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["DESTDIR=x", "PREFIX=/opt/my nexhb"], "PREFIX=/opt/my nexhb may contain only letters, digits and"),
        (["DESTDIR=x", "PREFIX=/opt/a|b"], "may contain only letters, digits and"),
        (["DESTDIR=x", "PREFIX=opt/nexhb"], "PREFIX=opt/nexhb must be an absolute path"),
        (["DESTDIR=x", "PREFIX=/opt/../nexhb"], "must not contain .."),
        (["DESTDIR=a:b", "PREFIX=/opt/nexhb"], "DESTDIR=a:b must not contain a colon"),
    ],
)
def test_an_unusable_path_is_rejected_with_a_message(words: list[str], says: str) -> None:
    found = subprocess.run(["make", "-C", ROOT, "install", *words], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert says in found.stderr


def test_a_second_installation_and_an_uninstallation_keep_the_operators_files(tmp_path: Path) -> None:
    output = make("install", tmp_path, "PREFIX=/opt/other").stdout
    assert "systemctl enable --now nexhb" in output
    prefix, units, etc = tmp_path / "opt" / "other", tmp_path / "etc" / "systemd" / "system", tmp_path / "etc" / "nexhb"
    assert (prefix / "bin" / "nexhb").read_text().startswith("#!/opt/other/bin/python")
    [package] = prefix.glob("lib/python3*/site-packages/nexhb")
    assert (package / "sql" / "schema.sql").exists()
    for unit in ("nexhb.service", "nexhb@.service"):
        text = (units / unit).read_text()
        assert "ExecStart=/opt/other/bin/nexhb serve" in text
        assert "/opt/nexhb" not in text
    config, credentials = etc / "nexhb.toml", etc / "credentials"
    assert config.read_text() == (ROOT / "config.example.toml").read_text()
    assert (config.stat().st_mode & 0o777, credentials.stat().st_mode & 0o777) == (0o640, 0o700)

    config.write_text("the operator's")
    (credentials / "admin_key").write_text("the operator's as well")
    (units / "nexhb.service").write_text("an older one")
    make("install", tmp_path, "PREFIX=/opt/other")
    assert config.read_text() == "the operator's"
    assert "/opt/other/bin/nexhb" in (units / "nexhb.service").read_text()

    make("uninstall", tmp_path, "PREFIX=/opt/other")
    make("uninstall", tmp_path, "PREFIX=/opt/other")
    assert not prefix.exists()
    assert list(units.iterdir()) == []
    assert (config.read_text(), (credentials / "admin_key").read_text()) == ("the operator's", "the operator's as well")


def test_a_python_in_a_private_home_is_rejected_and_uninstalling_a_wrong_prefix_deletes_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *realpath*) echo /home/somebody/bin/python3;; esac\n')
    python.chmod(0o755)
    found = make("install", tmp_path, f"PYTHON={python}", check=False)
    assert found.returncode != 0
    assert "the user nexhb cannot read" in found.stderr
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "precious").touch()
    make("uninstall", tmp_path, "PREFIX=/usr")
    assert (tmp_path / "usr" / "precious").exists()
    assert make("install", tmp_path, "PREFIX=relative", check=False).returncode != 0
