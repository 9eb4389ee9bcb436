"""What a text that people give may hold (an id, an alias, a note), and how any text is shown. Pure.

Every script passes, with its own blanks and joiners: "渋谷店　3号機" has an ideographic space (U+3000), "می‌دان" a
zero-width non-joiner (U+200C), and str.isprintable() refuses both. What moves a cursor, ends a line, turns the rest of
a line around or is half a character does not pass.
"""

from __future__ import annotations

import re

# Control characters, the separators of lines and paragraphs, the embeddings, overrides and isolates of bidirectional
# text (its marks U+200E, U+200F and U+061C are harmless), and surrogates.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def unfit(text: str) -> str:
    """The first character of `text` that a name may not hold, as U+XXXX; '' where there is none."""
    found = _UNFIT.search(text)
    return f"U+{ord(found[0]):04X}" if found else ""


def shown(text: str | None) -> str:
    """The text for a terminal, a line or a message: what a name may not hold is replaced by U+FFFD."""
    return _UNFIT.sub("\ufffd", text or "")


def quoted(text: str) -> str:
    """The text within a sentence."""
    return f"'{shown(text)}'"
