"""docs/architecture.md names every module of nexhb, and no module that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = PAGE.partition("\n## Modules\n")[2].partition("\n## ")[0]
DECISIONS = ROOT / "docs" / "decisions"


def modules() -> set[str]:
    """Return every module as a path without its ending: `daemon`, `http/transport/head`. cli/ is left out, because each
    of its files has the name of its command."""
    folder = ROOT / "nexhb"
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return {path.as_posix() for path in paths if path.name not in ("__init__", "__main__") and path.parts[0] != "cli"}


def on_the_page() -> set[str]:
    """Return the modules in the page's tables; the name of a folder stands before its table."""
    parts = re.split(r"^In `(?:nexhb/)?([a-z_/]*?)/?`", MODULES, flags=re.MULTILINE)[1:]
    names: set[str] = set()
    for folder, text in zip(parts[::2], parts[1::2], strict=True):
        for cell in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE):
            names |= {f"{folder}/{name}".lstrip("/") for name in re.findall(r"`([a-z_0-9]+)`", cell)}
    return names


def test_the_page_names_every_module_and_no_other() -> None:
    assert on_the_page() == modules()


def test_every_module_that_the_page_mentions_exists() -> None:
    folders = {module.partition("/")[0] for module in modules() if "/" in module}
    for path in re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)+)`", PAGE):
        assert path in modules() or path.partition("/")[0] not in folders, path


def test_every_decision_is_in_the_index() -> None:
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in DECISIONS.glob("[0-9]*.md")}
    assert set(re.findall(r"\]\((\d{4}-[^)]+\.md)\)", index)) == pages
