"""Each lock file has a hash for every package, is a subset of the largest lock file, and contains the dependencies of
pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOUSE = Path(__file__).parents[2]
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
LOCKS = {
    "requirements.lock": ("embedded",),
    "tests/requirements.lock": ("embedded", "test"),
    "bench/requirements.lock": ("embedded", "test", "compare"),
    "packaging/build.lock": (),
    "tests/swift-requirements.txt": (),
}
_ENTRY = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[^ \\;]+)( ; [^\\]+)?(?P<hashes>( \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)


def entries(lock: str) -> dict[tuple[str, str], set[str]]:
    """Return (name, version) → hashes. The file must contain nothing else."""
    text = (HOUSE / lock).read_text()
    found = {(m["name"], m["version"]): set(m["hashes"].replace("\\", "").split()) for m in _ENTRY.finditer(text)}
    assert _ENTRY.sub("", text) == "", f"{lock} contains something other than pinned packages with their hashes"
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_contains_only_pinned_packages_with_hashes(lock: str) -> None:
    assert entries(lock)


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if "swift" not in lock])
def test_the_locks_pin_the_same_release_of_each_package(lock: str) -> None:
    assert entries(lock).items() <= entries("bench/requirements.lock").items()


@pytest.mark.parametrize(("lock", "extras"), [(lock, extras) for lock, extras in LOCKS.items() if extras])
def test_the_locks_satisfy_pyproject(lock: str, extras: tuple[str, ...]) -> None:
    """With --no-deps, pip does not check the dependencies itself."""
    pinned = dict(entries(lock))
    asked = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        asked += [one for one in PROJECT["project"]["optional-dependencies"][extra] if not one.startswith("nexhb[")]
    for requirement in map(Requirement, asked):
        versions = [version for name, version in pinned if name == canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(version, prereleases=True) for version in versions), requirement


def test_the_lock_of_the_build_contains_what_the_build_requires() -> None:
    [backend] = map(Requirement, PROJECT["build-system"]["requires"])
    [version] = [version for name, version in entries("packaging/build.lock") if name == backend.name]
    assert backend.specifier.contains(version)


def test_whatever_installs_nexhb_installs_by_hash() -> None:
    for path in ("Makefile", "packaging/install"):
        text = (HOUSE / path).read_text()
        for line in text.splitlines():
            if re.search(r"pip install|pip_install -", line) and not line.endswith(("install -q uv", '"$@"; }')):
                assert "--require-hashes" in line or (
                    "--no-deps" in line and ("--no-build-isolation" in line or "--no-index" in line)
                ), line
