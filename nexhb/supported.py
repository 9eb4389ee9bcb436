"""The supported releases of libraries on whose undocumented behaviour nexhb relies."""

from __future__ import annotations

import re

from nexhb.errors import UnsupportedLibrary

# The first supported release, and the first unsupported release after that; both are the same as in pyproject.toml.
SUPPORTED = {
    "aiohttp": ("3.14.5", "3.15"),  # http/connections overrides private methods of its RequestHandler
    "asyncpg": ("0.32.0", "0.33"),  # postgres calls a connection's private protocol
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
    """Return the release of a version as numbers, without its markers of a pre-release or a local build."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
