"""docs/runbook.md, taken apart."""

from __future__ import annotations

import re


def anchors(markdown: str) -> set[str]:
    """The anchors of its headings, as GitHub and most others make them."""
    headings = re.findall(r"^#{1,6} (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
