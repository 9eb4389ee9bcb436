from __future__ import annotations

import pytest

from tests.support.sample_prose import (
    Text,
    collect,
    in_config,
    in_json,
    in_markdown,
    in_python,
    in_sql,
    main,
    sample,
)

PYTHON = '''"""A module."""

# The first line of a comment,
# and its second line.
LIMIT = 3  # the unit is seconds
OTHER = 4  # noqa: E501


def read(path: str) -> None:
    """Read the file."""
    if not path:
        raise ValueError(f"the file {path!r} does not exist")
    log.error("file.unreadable", hint="Check the permissions of the folder.")
    query("SELECT id FROM devices WHERE gone")
    tell("The folder was not readable yet.")
'''


def test_docstrings_comments_and_messages_of_python_are_texts() -> None:
    texts = {(text.line, text.kind, text.text) for text in in_python("nexhb/a.py", PYTHON)}
    assert texts >= {
        (1, "docstring", "A module."),
        (3, "comment", "The first line of a comment, and its second line."),
        (5, "comment", "the unit is seconds"),
        (10, "docstring", "Read the file."),
        (12, "message", "the file {path} does not exist"),
        (13, "message", "Check the permissions of the folder."),
        (15, "message", "The folder was not readable yet."),
    }
    assert not any("SELECT" in text or "noqa" in text for _, _, text in texts)


def test_in_tests_only_a_string_marked_as_a_message_is_a_text() -> None:
    texts = [text.text for text in in_python("tests/a.py", PYTHON)]
    assert "Check the permissions of the folder." in texts
    assert "The folder was not readable yet." not in texts


def test_comments_and_raised_messages_of_sql_are_texts() -> None:
    source = "-- name: x\n-- Newest first,\n-- by device.\nRAISE EXCEPTION 'no such flag: it''s %', a;\n"
    assert list(in_sql("sql/a.sql", source)) == [
        Text("sql/a.sql", 1, "comment", "Newest first, by device."),
        Text("sql/a.sql", 4, "message", "no such flag: it's %"),
    ]


def test_descriptions_of_yaml_and_json_are_texts() -> None:
    source = "a:\n  summary: The disk is full.\n  description: |\n    Two lines\n    of text.\n  b: 1  # why\n"
    assert {(text.line, text.text) for text in in_config("a.yml", source)} == {
        (2, "The disk is full."), (3, "Two lines of text."), (6, "why"),
    }  # fmt: skip
    assert [text.text for text in in_json("a.json", '{"title": "Heartbeats per second", "expr": "up"}')] == [
        "Heartbeats per second"
    ]


def test_a_page_is_its_sentences_and_cells_without_its_code() -> None:
    paragraph = "First sentence here. Second\nsentence of it. Third one."
    page = f"# Title\n\n{paragraph}\n\n```sh\nmake run\n```\n| a cell | another |\n"
    assert [(text.line, text.text) for text in in_markdown("docs/a.md", page)] == [
        (1, "Title"), (3, "First sentence here."), (3, "Second sentence of it."), (4, "Third one."),
        (9, "a cell"), (9, "another"),
    ]  # fmt: skip


def test_the_same_seed_picks_the_same_texts() -> None:
    texts = [Text("a.py", line, "comment", f"text {line}") for line in range(100)]
    assert sample(texts, 7, 5) == sample(texts, 7, 5) != sample(texts, 8, 5)
    assert len(sample(texts, 7, 500)) == 100


def test_the_repository_has_texts_in_every_folder_and_none_in_migrations() -> None:
    texts = collect()
    assert {"bench", "docs", "nexhb", "packaging", "sql", "tests"} <= {text.path.split("/")[0] for text in texts}
    assert not [text for text in texts if text.path.startswith("sql/migrations/")]


def test_the_sample_is_printed_with_its_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "7", "--count", "3", "docs/wire.md"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("docs/wire.md:") == 3
    assert printed.endswith("texts, seed 7\n")
