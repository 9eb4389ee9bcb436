"""Which releases of a library nexhb supports where it relies on more than the library documents."""

from __future__ import annotations

import re

from nexhb.errors import UnsupportedLibrary

# The first release that is supported, and the first that is not: as pyproject.toml has them.
SUPPORTED = {
    "aiohttp": ("3.14.5", "3.15"),  # http/connections overrides private methods of its RequestHandler
    "asyncpg": ("0.32.0", "0.33"),  # db calls a connection's private protocol
    "uvloop": ("0.23.0", "0.24"),  # http/connections depends on the order of the callbacks in start_tls
}


def check(name: str, version: str) -> None:
    """Raise UnsupportedLibrary unless nexhb supports this version of the library `name`."""
    first, end = SUPPORTED[name]
    if not _numbers(first) <= _numbers(version) < _numbers(end):
        raise UnsupportedLibrary(
            f"{name} {version} is installed, nexhb supports {first} and newer before {end}.",
            hint=f"Run pip install '{name}>={first},<{end}'.",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, as numbers: without what marks it as a pre-release or a build of somebody's own."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
