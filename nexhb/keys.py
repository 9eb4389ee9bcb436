"""The admin key: from the configuration, or else created at the first start and kept in data_dir with mode 0600."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from nexhb.config import Settings
from nexhb.errors import ConfigError, NexhbError

FILE = "admin_key"


def read(settings: Settings) -> str | None:
    """Return the admin key, or None if there is none yet. Raise ConfigError if its file cannot be read."""
    if settings.auth.admin_key is not None:
        return settings.auth.admin_key.get_secret_value()
    path = settings.data_dir / FILE
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", hint="Or set auth.admin_key.") from error


def read_or_make(settings: Settings) -> str:
    """Return the admin key, which is created if there is none. Raise ConfigError."""
    return read(settings) or _make(settings.data_dir)


def _make(data_dir: Path) -> str:
    path, key = data_dir / FILE, secrets.token_urlsafe(32)
    temporary = data_dir / f".{FILE}.{os.getpid()}"
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)  # as root: for PostgreSQL's user, too
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails if another daemon was first: then that daemon's key is used
        except FileExistsError:
            return path.read_text(encoding="ascii").strip()
        finally:
            temporary.unlink()
    except OSError as error:
        # Not a ConfigError if the disk is full, which may change while the daemon retries its start.
        kind = NexhbError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"The admin key cannot be stored: {error}.", hint="Set data_dir or auth.admin_key.") from error
    return key
