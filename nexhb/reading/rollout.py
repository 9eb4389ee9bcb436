"""The rollout of the fast reads by percent. Pure.

At a given percentage, a key is always included or never, and every key included at 10 % is also included at 50 %.
"""

from __future__ import annotations

import hashlib


def is_included(key: str, percent: int) -> bool:
    """Return whether `key` (a device_id, or the id of a request) is included in a rollout of `percent`."""
    return place(key) < percent


def place(key: str) -> int:
    """Return the percentage above which the key is included, 0 to 99, always the same for one key."""
    digest = hashlib.sha256(b"nexhb rollout:" + key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % 100
