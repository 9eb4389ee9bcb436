"""Names in all scripts are allowed; characters that end a line, move the cursor or reverse a line are not."""

from __future__ import annotations

import pytest

from nexhb.texts import quoted, shown, unfit

NAMES = [
    "渋谷店\u30003号機",  # an ideographic space
    "فروشگاه می\u200cدان",  # noqa: RUF001 - a zero-width non-joiner
    "क\u094d\u200dष",
    "חנות 7\u200f",  # a right-to-left mark
    "Магазин 7",
    "Straße\u00a05",
    "Cafe\u0301",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",  # a flag, with tags
    "\U0001f469\u200d\U0001f527",
    "\U0001fae9",  # newer than the Unicode tables of this Python
    "\ue000",
]
UNFIT = [
    "\t", "\n", "\r", "\0", "\x1b", "\x1f", "\x7f", "\x85", "\x9b", "\x9f", "\u2028", "\u2029", "\u202a", "\u202e",
    "\u2066", "\u2069", "\ud800", "\ud83d", "\udfff",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_script_is_allowed_and_shown_unchanged(name: str) -> None:
    assert unfit(name) == ""
    assert shown(name) == name
    assert quoted(name) == f"'{name}'"


@pytest.mark.parametrize("character", UNFIT)
def test_a_character_that_is_not_allowed_is_named_and_shown_as_a_replacement(character: str) -> None:
    name = f"Store{character}7"
    assert unfit(name) == f"U+{ord(character):04X}"
    assert shown(name) == "Store\ufffd7"
