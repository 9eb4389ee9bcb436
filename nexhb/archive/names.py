"""Names of objects: parts joined by `/`, checked so that no name can leave its store."""

from __future__ import annotations

from nexhb.errors import StoreError


def checked_name(name: str) -> str:
    """Return `name`. Raises StoreError if it is absolute, contains NUL, or has an empty or hidden part."""
    if "\0" in name or any(not part or part.startswith(".") for part in name.split("/")):
        raise StoreError(f"{name!r} is not a valid object name.")
    return name


def name_below(base: str, url: str) -> str:
    """Return the part of `url` after `base`, which ends with `/`. Raises StoreError if `url` is not below `base`."""
    if not url.startswith(base):
        raise StoreError(f"{url} is not in {base}.", hint="See archive.url.")
    return checked_name(url.removeprefix(base))
