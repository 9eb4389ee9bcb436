"""Which characters are allowed in texts that people enter (an id, an alias, a note), and how texts are shown. Pure.

Every script is allowed, with its own blanks and joiners: "渋谷店　3号機" has an ideographic space (U+3000), "می‌دان" a
zero-width non-joiner (U+200C), and str.isprintable() rejects both. Characters that move the cursor, end a line or
reverse the rest of a line are not allowed, nor are lone surrogates.
"""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, surrogates, and the embeddings, overrides and isolates of
# bidirectional text (its marks U+200E, U+200F and U+061C are harmless).
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def unfit(text: str) -> str:
    """Return the first character of `text` that is not allowed, as U+XXXX, or ''."""
    match = _UNFIT.search(text)
    return f"U+{ord(match[0]):04X}" if match else ""


def shown(text: str | None) -> str:
    """Return the text for a terminal, a log line or a message, with U+FFFD for each character that is not allowed."""
    return _UNFIT.sub("\ufffd", text or "")


def quoted(text: str) -> str:
    """Return the text in quotation marks, for use within a sentence."""
    return f"'{shown(text)}'"
