"""The names of objects: parts joined by `/`, none of which can leave the place that they are given."""

from __future__ import annotations

from nexhb.errors import StoreError


def checked(name: str) -> str:
    """`name` itself. Raises StoreError for what is absolute, empty in a part, hidden (as `..` is) or holds a NUL."""
    if "\0" in name or any(not part or part.startswith(".") for part in name.split("/")):
        raise StoreError(f"{name!r} is no name of an object.")
    return name


def below(base: str, url: str) -> str:
    """The name of the object at `url`, which lies below `base` (with its closing `/`). Raises StoreError otherwise."""
    if not url.startswith(base):
        raise StoreError(f"{url} does not lie in {base}.", hint="See archive.url.")
    return checked(url.removeprefix(base))
