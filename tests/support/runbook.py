"""Parse docs/runbook.md and other pages in Markdown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

RUNBOOK = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """Return the anchors of the page's headings, as GitHub and most other renderers create them."""
    headings = re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(markdown: str) -> list[str]:
    """Return the anchors of the page's links to itself."""
    return re.findall(r"\]\(#([^)]*)\)", _FENCE.sub("", markdown))


def blocks(markdown: str, language: str) -> list[str]:
    """Return the fenced blocks of this language."""
    return [text for found, text in _FENCE.findall(markdown) if found == language]


def chapters(markdown: str) -> dict[str, list[str]]:
    """Return the blocks of commands by the heading above them."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^(?=#{2,6} )", markdown, flags=re.MULTILINE):
        found[part.partition("\n")[0].lstrip("# ")] = blocks(part, "sh")
    return {heading: commands for heading, commands in found.items() if commands}


def inline(markdown: str) -> list[str]:
    """Return each text in backticks outside of the blocks, on one line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", _FENCE.sub("", markdown))]


def commands(markdown: str) -> list[list[str]]:
    """Return every call of nexhb, in blocks and in the text, as words, without pipes, redirections and comments."""
    lines = [line.strip() for block in blocks(markdown, "sh") for line in block.splitlines()]
    found = []
    for line in [*lines, *inline(markdown)]:
        bare = re.split(r"\s#\s|\s[|&>]", re.sub(r"^(?:[A-Z_]+=\S*\s+)+", "", line))[0].rstrip("&| ")
        if "…" not in bare and bare.startswith(("nexhb ", "/opt/nexhb/bin/nexhb ")):
            found.append(shlex.split(bare)[1:])
    return found
