"""Device tokens: random, and stored only as their SHA-256."""

from __future__ import annotations

import base64
import hashlib
import secrets


def new_token() -> str:
    """Return a new device token: 32 random bytes as URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def hash_token(token: str) -> bytes:
    """Return the SHA-256 under which a token is stored and looked up (NexMDM calls its hex form token_id)."""
    # Bytes of a header that are not UTF-8 arrive as surrogates. Such a token is unknown, not an error.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
