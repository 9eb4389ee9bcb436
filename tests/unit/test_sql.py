"""sql/: its files are cut into named queries, every name used is there, and every query there is used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nexhb
from nexhb import migrate, sql

ROOMS = sorted(path.stem for path in (sql.root() / "queries").glob("*.sql"))


# ---- the parser -------------------------------------------------------------------------------------------------


def test_a_name_starts_a_query_and_the_next_name_ends_it() -> None:
    found = sql.parse("-- of the file\n\n-- name: one\n-- why\nSELECT 1;\n\n-- name: two_2\nSELECT 2\nFROM t;\n")
    assert found == {"one": "SELECT 1", "two_2": "SELECT 2\nFROM t"}


def test_comments_are_left_out_and_what_is_indented_is_kept() -> None:
    found = sql.parse("-- name: one\n-- $1 what\nSELECT $1 -- of this\n  -- still inside\n-- and this not\nFROM t;")
    assert found["one"] == "SELECT $1 -- of this\n  -- still inside\nFROM t"


def test_a_text_without_names_has_no_queries() -> None:
    assert sql.parse("") == sql.parse("-- names: one\nSELECT 1;\n--name: two\nSELECT 2;") == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("-- name: one\nSELECT 1;\n-- name: one\nSELECT 2;", "one"),
        ("-- name: one\n-- name: two\nSELECT 2;", "one"),
        ("-- name: one\nSELECT 1;\n-- name: two\n-- only a comment\n", "two"),
        ("-- name: one", "one"),
    ],
)
def test_a_name_that_stands_twice_or_alone_is_an_error(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is named twice or empty"):
        sql.parse(text)


def test_queries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        sql.queries("db")["ping"] = "SELECT 2"  # type: ignore[index]


# ---- names and their use ----------------------------------------------------------------------------------------


def _queries_call(node: ast.AST) -> str | None:
    """The room, where this is `sql.queries("room")`."""
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "sql.queries"
        and isinstance(node.args[0], ast.Constant)
    ):
        return str(node.args[0].value)
    return None


def used() -> Iterator[tuple[str, str, str]]:
    """Where, room and name of every use in nexhb: `_Q = sql.queries("room")`, `_Q["name"]`, or both at once."""
    package = Path(nexhb.__file__).parent
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        held: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and (room := _queries_call(node.value)):
                held |= {target.id: room for target in node.targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Subscript):
                continue
            room = held.get(node.value.id) if isinstance(node.value, ast.Name) else _queries_call(node.value)
            if room:
                where = f"{path.relative_to(package)}:{node.lineno}"
                assert isinstance(node.slice, ast.Constant), f"{where}: a query's name is written out"
                yield where, room, str(node.slice.value)


def test_every_query_that_is_used_is_there() -> None:
    uses = list(used())
    assert len(uses) > 30
    assert [(where, room, name) for where, room, name in uses if name not in sql.queries(room)] == []


def test_every_query_that_is_there_is_used() -> None:
    uses = {(room, name) for _, room, name in used()}
    assert [(room, name) for room in ROOMS for name in sql.queries(room) if (room, name) not in uses] == []


def test_every_name_in_a_file_is_taken_by_the_parser() -> None:
    for path in (sql.root() / "queries").glob("*.sql"):
        named = [
            line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"(?<![\w:])name:(?!:)", line)
        ]
        assert len(named) == len(sql.queries(path.stem)), path.name


def test_the_seeds_queries_have_the_names_of_ours() -> None:
    assert {name.removeprefix("list_") for name in sql.legacy()} <= set(sql.queries("reads"))
    assert sql.legacy()


def test_the_arguments_of_a_query_are_numbered_without_a_gap() -> None:
    for room in ROOMS:
        for name, text in sql.queries(room).items():
            highest = next((n for n in range(20, 0, -1) if f"${n}" in text), 0)
            assert all(f"${n}" in text for n in range(1, highest + 1)), f"{room}.{name}"


def test_a_migration_says_why_what_it_locks_and_how_to_prepare() -> None:
    for migration in migrate.find():
        head = migration.text.partition("\n\n")[0]
        assert all(word in head for word in ("-- Why:", "-- Lock:", "-- To prepare:")), migration.name
