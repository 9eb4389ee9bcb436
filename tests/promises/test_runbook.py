"""docs/runbook.md is correct: commands in it and in other pages are valid, statements run, and every name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest
import typer

from nexhb import cli
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.http.app import make_app
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.operator_api.context import OperatorApi
from nexhb.postgres.connections import Connection
from tests.support import runbook
from tests.support.rules import ALERTS, declared
from tests.support.runbook import RUNBOOK

HOUSE = Path(__file__).parents[2]
PAGES = [HOUSE / "docs" / f"{name}.md" for name in ("runbook", "moving", "archive", "install")]
COMMANDS = [words for page in PAGES if page.exists() for words in runbook.commands(page.read_text())]
INLINE = runbook.inline(RUNBOOK)
DOTTED = sorted({text for text in INLINE if re.fullmatch(r"[a-z_]+\.[a-z_]+", text)})
JOB_EVENTS = ("started", "completed", "skipped", "failed")


@pytest.fixture(scope="module")
def command() -> Any:
    """Return the whole command line. Importing a command registers it."""
    for module in iter_modules(cli.__path__):
        import_module(f"nexhb.cli.{module.name}")
    return typer.main.get_command(cli.app)


def test_the_schema_has_many_objects_to_compare() -> None:
    assert len(COMMANDS) > 60
    assert len(DOTTED) > 30


@pytest.mark.parametrize("words", {tuple(words): None for words in COMMANDS}, ids=" ".join)
def test_a_command_on_a_page_exists_with_its_options(
    command: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGACY_DATABASE_URL", "postgresql://nexmdm")
    parse(command, "nexhb", list(words))


UsageError: Any = typer.BadParameter.__base__  # from the copy of click that typer contains


def parse(command: Any, name: str, words: list[str], parent: Any = None) -> None:
    """Parse a command line without running it. Raises UsageError."""
    group = hasattr(command, "resolve_command")
    if words == ["--version"] or (group and not words):
        return
    context = command.make_context(name, words, parent)
    if group and (rest := [*context._protected_args, *context.args]):
        found, sub, rest = command.resolve_command(context, rest)
        parse(sub, found, rest, context)


def test_a_command_on_a_page_that_does_not_exist_is_detected(command: Any) -> None:
    for words in (
        ["archives", "list"],
        ["archive", "list", "--all"],
        ["archive", "restore"],
        ["audit"],
        ["flags", "st"],
    ):
        with pytest.raises(UsageError):
            parse(command, "nexhb", words)


# ---- what it names --------------------------------------------------------------------------------------------------


def events() -> set[str]:
    """Return every event that nexhb may log: string literals of the form `word.word`, and those that begin with a job's
    name."""
    literals = {text for path in (HOUSE / "nexhb").rglob("*.py") for text in _strings(path)}
    dotted = {text for text in literals if re.fullmatch(r"[a-z_]+\.[a-z_]+", text)}
    return dotted | {f"{prefix}.{suffix}" for prefix in literals if prefix.isidentifier() for suffix in JOB_EVENTS}


def _strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def settings() -> set[str]:
    """Return every setting, as section.key or key."""
    found = set(Settings.model_fields)
    for section, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found |= {f"{section}.{key}" for key in inner or ()}
    return found


def test_a_name_with_a_dot_is_a_setting_or_an_event() -> None:
    known = events() | settings()
    assert [name for name in DOTTED if name not in known] == []


def test_every_metric_is_exported() -> None:
    known = declared()
    named = set(re.findall(r"\b(nexhb_[a-z_]+|hb_[a-z_]+_(?:total|ms))\b", RUNBOOK))
    files = {"nexhb_admin_key"}
    assert sorted(named - known.keys() - files) == []


def test_every_http_call_on_a_page_exists() -> None:
    paths = set(re.findall(r"(?<![\w.])(/(?:v1|ops|healthz|readyz|metrics)[\w/{}-]*)", RUNBOOK))
    app = make_app(cast("DeviceApi", SimpleNamespace(settings=Settings())), cast("OperatorApi", SimpleNamespace()))
    known = {route.resource.canonical for route in app.router.routes() if route.resource is not None}
    assert sorted(path for path in paths - known if path != "/ops") == []


def test_every_alert_and_every_check_of_the_doctor_has_a_section() -> None:
    there = runbook.anchors(RUNBOOK)
    assert [name for name in ALERTS if name.lower() not in there] == []
    assert [name for name in re.findall(r"\bNexhb[A-Z]\w+", RUNBOOK) if name not in ALERTS] == []
    lines = RUNBOOK.partition("## What `nexhb doctor` says")[2].partition("\n## ")[0]
    assert [name for name in checks.CHECKS if f"`{name}`" not in lines] == []


@pytest.mark.parametrize("page", ["runbook", "moving"])
def test_every_other_link_to_a_section_leads_to_it(page: str) -> None:
    text = (HOUSE / "docs" / f"{page}.md").read_text()
    there = runbook.anchors(text)
    assert [anchor for anchor in runbook.links(text) if anchor not in there] == []
    for path in (*(HOUSE / "nexhb").rglob("*.py"), *(HOUSE / "docs").glob("*.md"), HOUSE / "README.md"):
        for anchor in re.findall(rf"{page}\.md#([\w-]+)", path.read_text()):
            assert anchor in there, path


# ---- its statements -------------------------------------------------------------------------------------------------

_WRITTEN = [one.strip() for block in runbook.blocks(RUNBOOK, "sql") for one in block.split(";\n") if one.strip()] + [
    text for text in [*INLINE, *runbook.inline((HOUSE / "docs" / "moving.md").read_text())]
    if re.match(r"(SELECT|UPDATE) ", text)
]  # fmt: skip
# The other statements change the whole server, or cannot run in a transaction.
STATEMENTS = [
    one for one in _WRITTEN
    if not one.startswith(("ALTER SYSTEM", "VACUUM")) and "SLOT" not in one.upper().partition("DROP")[2]
]  # fmt: skip


@pytest.mark.parametrize("statement", STATEMENTS)
async def test_each_sql_statement_on_a_page_runs(conn: Connection, statement: str) -> None:
    await conn.execute("CREATE TABLE device_heartbeats_20261124 (LIKE device_heartbeats INCLUDING ALL)")
    transaction = conn.transaction()
    await transaction.start()
    try:
        await conn.execute(statement)
    except asyncpg.PostgresError as error:
        raise AssertionError(f"{error}: {statement}") from error
    finally:
        await transaction.rollback()
