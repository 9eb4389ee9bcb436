"""The configuration file: which one it is, and what stands in it. One that is there and cannot be read is an error."""

from __future__ import annotations

import codecs
import os
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from nexhb.errors import ConfigError

# Where a file is looked for that nobody names.
PLACES = (Path("nexhb.toml"), Path("/etc/nexhb/nexhb.toml"))
BYTES_MOST = 1 << 20
_READ = "Run nexhb as a user who can read it, or name another file with --config or $NEXHB_CONFIG."
# Longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "begins with a byte order mark (BOM)",
    codecs.BOM_UTF32_LE: "is UTF-32",
    codecs.BOM_UTF32_BE: "is UTF-32",
    codecs.BOM_UTF16_LE: "is UTF-16",
    codecs.BOM_UTF16_BE: "is UTF-16",
}


def find_file(argument: Path | None) -> Path | None:
    """`--config`, else $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml, else none.

    Raises ConfigError where a named file is not there, or where nobody can tell whether one of the others is.
    """
    named = os.environ.get("NEXHB_CONFIG")
    if argument is None and named is not None and not named.strip():
        raise ConfigError("NEXHB_CONFIG is set, but empty.", hint="Unset it, or let it name a file.")
    if argument or named:
        return argument or Path(str(named))
    for place in PLACES:
        try:
            place.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            said = f"Whether there is a file {_absolute(place)} cannot be told: {error.strerror}."
            raise ConfigError(said, hint=f"{_READ} A relative path counts from the folder that you are in.") from None
        return place
    return None


def _absolute(path: Path) -> Path:
    with suppress(OSError):  # of a folder that is not there any more
        return path.absolute()
    return path


def read(path: Path) -> dict[str, Any]:
    """What stands in a configuration file. Raises ConfigError where it cannot be read, whatever the reason."""
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES_MOST + 1)
    except FileNotFoundError:
        what = "is a link to a file that is not there" if path.is_symlink() else ""
        said = f"{path} {what}." if what else f"There is no file {path}."
        raise ConfigError(said, hint="Name another with --config or $NEXHB_CONFIG.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", hint=_READ) from None
    if len(raw) > BYTES_MOST:
        raise ConfigError(f"{path} is larger than {BYTES_MOST >> 20} MiB.")
    save = "Save it as UTF-8 without a byte order mark."
    if said := next((said for mark, said in _MARKS.items() if raw.startswith(mark)), "is not text" * (b"\0" in raw)):
        raise ConfigError(f"{path} {said}.", hint=save)
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}.", hint=save) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
