"""docs/runbook.md, taken apart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

RUNBOOK = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """The anchors of its headings, as GitHub and most others make them."""
    headings = re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(markdown: str) -> list[str]:
    """The anchors that it points to within itself."""
    return re.findall(r"\]\(#([^)]*)\)", _FENCE.sub("", markdown))


def blocks(markdown: str, language: str) -> list[str]:
    """Its fenced blocks of this language."""
    return [text for found, text in _FENCE.findall(markdown) if found == language]


def chapters(markdown: str) -> dict[str, list[str]]:
    """Its blocks of commands by the heading that they stand under."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^(?=#{2,6} )", markdown, flags=re.MULTILINE):
        found[part.partition("\n")[0].lstrip("# ")] = blocks(part, "sh")
    return {heading: commands for heading, commands in found.items() if commands}


def inline(markdown: str) -> list[str]:
    """What stands in backticks within its text, each on one line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", _FENCE.sub("", markdown))]


def commands(markdown: str) -> list[list[str]]:
    """Every call of nexhb, in blocks and in the text, as its words; without what is piped, redirected or commented."""
    lines = [line.strip() for block in blocks(markdown, "sh") for line in block.splitlines()]
    found = []
    for line in [*lines, *inline(markdown)]:
        bare = re.split(r"\s#\s|\s[|&>]", re.sub(r"^(?:[A-Z_]+=\S*\s+)+", "", line))[0].rstrip("&| ")
        if "…" not in bare and bare.startswith(("nexhb ", "/opt/nexhb/bin/nexhb ")):
            found.append(shlex.split(bare)[1:])
    return found
