"""sql/: files are split into named queries, every name used exists, and every query is used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nexhb
from nexhb.heartbeat import CONTENT, MEASURED, Label
from nexhb.postgres import migrate, sql

COLUMN_NAMES = [column.name for column in CONTENT]
ROOMS = sorted(path.stem for path in (sql.root() / "queries").glob("*.sql"))


# ---- the parser -------------------------------------------------------------------------------------------------


def test_a_name_starts_a_query_and_the_next_name_ends_it() -> None:
    found = sql.parse("-- of the file\n\n-- name: one\n-- why\nSELECT 1;\n\n-- name: two_2\nSELECT 2\nFROM t;\n")
    assert found == {"one": "SELECT 1", "two_2": "SELECT 2\nFROM t"}


def test_comments_are_removed_and_indentation_is_kept() -> None:
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
def test_a_duplicate_name_or_one_without_a_query_is_an_error(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is defined twice or empty"):
        sql.parse(text)


def test_a_list_is_written_out_for_each_column() -> None:
    queries = sql.parse(
        "-- name: facts\nSELECT {{facts: f.$column}}, $1 FROM unnest({{facts: $2…::$type[]}}) f;\n"
        "-- name: content\nSELECT {{measured: has & $section}},\n    {{content: h.$column | nullif(l.$column, '')}};"
    )
    assert queries["facts"] == (
        "SELECT f.alias, f.android_version, f.sdk_int, f.patch_level, f.build_id, f.model, f.manufacturer, $1 "
        "FROM unnest($2::text[], $3::text[], $4::integer[], $5::text[], $6::text[], $7::text[], $8::text[]) f"
    )
    sections, content = queries["content"].splitlines()
    assert sections == f"SELECT {', '.join(f'has & {column.section}' for column in MEASURED)},"
    expected = (f"nullif(l.{name}, '')" if name in Label._fields else f"h.{name}" for name in COLUMN_NAMES)
    assert content == f"    {', '.join(expected)}"


def test_an_unknown_list_is_an_error() -> None:
    with pytest.raises(KeyError, match="contents"):
        sql.parse("-- name: one\nSELECT {{contents: $column}};")


def test_every_list_of_sql_is_written_out() -> None:
    texts = [text for room in ROOMS for text in sql.queries(room).values()] + [*sql.history_reads().values()]
    assert [text for text in texts if re.search(r"\{\{|\}\}|\$column\b|\$type|\$section|\$\d+…", text)] == []


def test_the_writer_replaces_the_columns_of_a_section_that_is_present_and_a_value_that_is_stated() -> None:
    """The CASE of each column in upsert_last_status and heal, as PostgreSQL receives it."""
    case = (
        "CASE WHEN newer AND (has & 2 <> 0 OR excluded.signal_dbm IS NOT NULL) "
        "THEN excluded.signal_dbm ELSE s.signal_dbm END"
    )
    for room, name in (("writer", "upsert_last_status"), ("reconcile", "heal")):
        assert case in " ".join(sql.queries(room)[name].split())


def test_queries_are_immutable() -> None:
    with pytest.raises(TypeError):
        sql.queries("connections")["ping"] = "SELECT 2"  # type: ignore[index]


# ---- names and their use ----------------------------------------------------------------------------------------


def _queries_call(node: ast.AST) -> str | None:
    """Return the file name if this is `sql.queries("file")`."""
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "sql.queries"
        and isinstance(node.args[0], ast.Constant)
    ):
        return str(node.args[0].value)
    return None


def used() -> Iterator[tuple[str, str, str]]:
    """Yield the module, the file of sql/ and the name of each query that nexhb uses: `_Q = sql.queries("file")` and
    `_Q["name"]`, or both in one expression."""
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


def test_every_query_used_exists() -> None:
    uses = list(used())
    assert len(uses) > 30
    assert [(where, room, name) for where, room, name in uses if name not in sql.queries(room)] == []


def test_every_query_is_used() -> None:
    uses = {(room, name) for _, room, name in used()}
    assert [(room, name) for room in ROOMS for name in sql.queries(room) if (room, name) not in uses] == []


def test_a_file_is_named_after_a_module_or_a_package_that_uses_it() -> None:
    users: dict[str, set[str]] = {room: set() for room in ROOMS}
    for where, room, _ in used():
        users[room] |= set(Path(where.partition(":")[0]).with_suffix("").parts)
    other_names = {"nexmdm_import": "nexmdm", "writer": "ingest"}  # sql/README.md says why
    assert [room for room in ROOMS if other_names.get(room, room) not in users[room]] == []


def test_the_parser_finds_every_name_in_a_file() -> None:
    for path in (sql.root() / "queries").glob("*.sql"):
        named = [
            line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"(?<![\w:])name:(?!:)", line)
        ]
        assert len(named) == len(sql.queries(path.stem)), path.name


def test_the_old_systems_queries_have_the_names_of_the_new_ones() -> None:
    assert {name.removeprefix("list_") for name in sql.history_reads()} <= set(sql.queries("reads"))
    assert sql.history_reads()


def test_the_arguments_of_a_query_are_numbered_without_a_gap() -> None:
    for room in ROOMS:
        for name, text in sql.queries(room).items():
            numbers = {int(number) for number in re.findall(r"\$(\d+)", text)}
            assert numbers == set(range(1, len(numbers) + 1)), f"{room}.{name}"


def test_a_migration_states_its_reason_its_locks_and_how_to_prepare() -> None:
    for migration in migrate.find_migrations():
        head = migration.text.partition("\n\n")[0]
        assert all(word in head for word in ("-- Why:", "-- Lock:", "-- To prepare:")), migration.name
