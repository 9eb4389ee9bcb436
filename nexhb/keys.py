"""The admin key: from the configuration, else made at first start and kept in data_dir with mode 0600."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from nexhb.config import Settings
from nexhb.errors import ConfigError, NexhbError

FILE = "admin_key"


def read(settings: Settings) -> str | None:
    """The admin key, or None where none was made yet. Raises ConfigError where the file cannot be read."""
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
    """The admin key, made now where there is none. Raises ConfigError."""
    return read(settings) or _make(settings.data_dir)


def _make(data_dir: Path) -> str:
    path, key = data_dir / FILE, secrets.token_urlsafe(32)
    beside = data_dir / f".{FILE}.{os.getpid()}"
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)  # as root, PostgreSQL's own user may need to pass
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)  # fails where another daemon was first: then its key counts
        except FileExistsError:
            return path.read_text(encoding="ascii").strip()
        finally:
            beside.unlink()
    except OSError as error:
        kind = NexhbError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError  # a disk may be emptied
        raise kind(f"The admin key cannot be kept: {error}.", hint="Set data_dir or auth.admin_key.") from error
    return key
