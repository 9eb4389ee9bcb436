"""Find and read the configuration file. A file that exists and cannot be read is an error."""

from __future__ import annotations

import codecs
import os
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from nexhb.errors import ConfigError

# Where to look for a file if none is named.
DEFAULT_PATHS = (Path("nexhb.toml"), Path("/etc/nexhb/nexhb.toml"))
MAX_BYTES = 1 << 20
_READ_HINT = "Run nexhb as a user who can read it, or name another file with --config or $NEXHB_CONFIG."
# Longer marks first: the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "begins with a byte order mark (BOM)",
    codecs.BOM_UTF32_LE: "is UTF-32",
    codecs.BOM_UTF32_BE: "is UTF-32",
    codecs.BOM_UTF16_LE: "is UTF-16",
    codecs.BOM_UTF16_BE: "is UTF-16",
}


def find_file(argument: Path | None) -> Path | None:
    """Return the path of `--config`, else $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml, else None.

    Raises ConfigError if $NEXHB_CONFIG is empty, or if it cannot be determined whether a default path exists.
    """
    named = os.environ.get("NEXHB_CONFIG")
    if argument is None and named is not None and not named.strip():
        raise ConfigError("NEXHB_CONFIG is set, but empty.", hint="Unset it, or set it to the path of a file.")
    if argument or named:
        return argument or Path(str(named))
    for path in DEFAULT_PATHS:
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            detail = f"Cannot determine whether {_absolute(path)} exists: {error.strerror}."
            hint = f"{_READ_HINT} A relative path starts at the current folder."
            raise ConfigError(detail, hint=hint) from None
        return path
    return None


def _absolute(path: Path) -> Path:
    with suppress(OSError):  # raised if the current folder was deleted
        return path.absolute()
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the content of a configuration file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        is_link = path.is_symlink()
        detail = f"{path} is a link to a file that does not exist." if is_link else f"{path} does not exist."
        raise ConfigError(detail, hint="Name another file with --config or $NEXHB_CONFIG.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", hint=_READ_HINT) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB.")
    encoding_hint = "Save it as UTF-8 without a byte order mark."
    not_text = "is not text" if b"\0" in raw else ""
    problem = next((text for mark, text in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), not_text)
    if problem:
        raise ConfigError(f"{path} {problem}.", hint=encoding_hint)
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        detail = f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}."
        raise ConfigError(detail, hint=encoding_hint) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
