"""Print texts of the repository picked at random, for a reader who did not write them: docstrings, comments, messages,
help texts and sentences of the pages.

    python -m tests.support.sample_prose --seed 7
    python -m tests.support.sample_prose --seed 7 --count 20 nexhb/http bench

The same seed prints the same texts as long as the files stay the same. docs/style.md has the rules for texts.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "bench", "docs", "nexhb", "packaging", "sql", "tests")
FILES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "config.example.toml",
    "pyproject.toml",
)
# Applied migrations are compared by checksum: their text is final.
FINAL = ("sql/migrations/",)
EXAMPLES = ("docs/style.md",)  # has bad sentences on purpose
MIN_WORDS = 3  # shorter comments, such as "# s", are left out
MIN_WORDS_OF_STRING = 4  # of a string literal that nothing around it marks as a message

_MARKED_CALLS = {"critical", "debug", "echo", "error", "exception", "fail", "info", "print", "secho", "skip", "warning"}
_MARKED_KEYWORDS = {"description", "detail", "epilog", "help", "hint", "msg", "reason", "short_help", "title"}
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|shellcheck|!)|#.*-\*-")
_SQL = re.compile(
    r"\s*(ALTER|ANALYZE|BEGIN|CALL|COMMIT|COPY|CREATE|DELETE|DROP|EXPLAIN|GRANT|INSERT|LOCK|REVOKE|ROLLBACK|SELECT|SET|"
    r"SHOW|TRUNCATE|UPDATE|VACUUM|WITH)\b"
)
_YAML_TEXT = re.compile(
    r"^(?P<indent> *)(?:- )?(?P<key>summary|description|title): *"
    r"(?:[|>]-?\n(?P<block>(?:(?P=indent) +.*\n|\n)+)|(?P<line>\S.*)$)",
    re.MULTILINE,
)
_EXPRESSION = re.compile(r"\{[^{}]*\}")  # of an f-string
_NAMES = re.compile(r"\{[^{}]*\}|`[^`]*`|\]\([^)]*\)")  # expressions, code spans, targets of links: not prose
_WORD = re.compile(r"[A-Za-z][a-z']+")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9`)\"”][.!?])\s+(?=[A-Z`\"(\[*]|nexhb )")


class Text(NamedTuple):
    """A text and the place where it stands."""

    path: str  # relative to the root
    line: int
    kind: str  # docstring, comment, message or page
    text: str


def in_python(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, comments and messages of a Python file."""
    tree = ast.parse(source)
    docstrings = _docstrings(tree)
    for line, text in docstrings.values():
        yield Text(path, line, "docstring", text)
    yield from _python_comments(path, source)
    marked = set(_marked_strings(tree))
    every_string = not path.startswith("tests/")  # in tests most strings are data
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in ast.walk(node) if part is not node)
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inside and id(node) not in docstrings:
            text = _string(node)
            if id(node) in marked or (every_string and _is_prose(text)):
                yield Text(path, node.lineno, "message", text)


def _docstrings(tree: ast.AST) -> dict[int, tuple[int, str]]:
    """Return line and text of every docstring, by the identity of its node."""
    docstrings = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text = ast.get_docstring(node)
            if text and isinstance(first, ast.Expr):
                docstrings[id(first.value)] = (first.lineno, text)
    return docstrings


def _python_comments(path: str, source: str) -> Iterator[Text]:
    """Yield comments; consecutive lines with nothing but a comment are one text."""
    block: list[tuple[int, int, str]] = []  # line, column, text
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type != tokenize.COMMENT or _DIRECTIVE.match(token.string):
            continue
        line, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and block[-1][:2] == (line - 1, column)):
            yield _joined(path, block)
            block = []
        block.append((line, column if alone else -1, token.string.lstrip("#: ")))
    if block:
        yield _joined(path, block)


def _joined(path: str, block: list[tuple[int, int, str]]) -> Text:
    """Return the lines of a block as one text, without rulers of dashes."""
    text = re.sub(r"-{3,}", "", " ".join(text.strip() for _, _, text in block))
    return Text(path, block[0][0], "comment", text.strip())


def _marked_strings(tree: ast.AST) -> Iterator[int]:
    """Yield the identity of each string that is raised, asserted, logged or printed, or is a help text."""
    for node in ast.walk(tree):
        candidates: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            candidates += node.exc.args
        elif isinstance(node, ast.Assert) and node.msg is not None:
            candidates.append(node.msg)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            candidates += node.args if name in _MARKED_CALLS else []
            candidates += [keyword.value for keyword in node.keywords if keyword.arg in _MARKED_KEYWORDS]
        yield from (id(candidate) for candidate in candidates)


def _string(node: ast.JoinedStr | ast.Constant) -> str:
    """Return the text of a literal; the expressions of an f-string stand in braces."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(
        _string(part) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
        for part in node.values
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )


def _is_prose(text: str) -> bool:
    """Tell a sentence from a statement, a URL, a format or a list of names."""
    text = _EXPRESSION.sub("", text)
    words = _WORD.findall(text)
    looks_like_code = _SQL.match(text) or re.search(r'[;{}<>=]\s*\n|^\s*[/<{\[]|":', text)
    is_list = text.count(",") >= len(words) / 2
    return len(words) >= MIN_WORDS_OF_STRING and not looks_like_code and not is_list


def in_sql(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a SQL file, and what it raises or stores as a COMMENT."""
    yield from _line_comments(path, source, "--")
    for match in re.finditer(r"(?:RAISE\s+\w+|HINT\s*=|DETAIL\s*=|\bIS)\s*'((?:[^']|'')+)'", source):
        yield Text(path, source.count("\n", 0, match.start()) + 1, "message", match[1].replace("''", "'"))


def in_config(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a file in which # begins a comment, the targets' help of a Makefile, and YAML's
    descriptions."""
    yield from _line_comments(path, source, "#")
    if path.endswith((".yml", ".yaml")):
        for match in _YAML_TEXT.finditer(source):
            text = " ".join(match["block"].split()) if match["block"] else match["line"].strip("\"'")
            yield Text(path, source.count("\n", 0, match.start("key")) + 1, "message", text)


def _line_comments(path: str, source: str, marker: str) -> Iterator[Text]:
    block: list[tuple[int, int, str]] = []
    for number, line in enumerate(source.splitlines(), 1):
        match = re.match(rf"^(.*?)(?<!\S){re.escape(marker)}+\s(?:name: \w+)?(.*)$", line)
        if match is None or _DIRECTIVE.match(line):
            continue
        alone = not match[1].strip()
        if block and not (alone and block[-1][:2] == (number - 1, len(match[1]))):
            yield _joined(path, block)
            block = []
        block.append((number, len(match[1]) if alone else -1, match[2]))
    if block:
        yield _joined(path, block)


def in_markdown(path: str, source: str) -> Iterator[Text]:
    """Yield the sentences and table cells of a page; code blocks and HTML comments are left out."""
    blank = re.compile(r"^ *```.*?^ *```$|<!--.*?-->", re.DOTALL | re.MULTILINE)
    source = blank.sub(lambda match: "\n" * match[0].count("\n"), source)
    paragraph: list[str] = []
    start = 0
    for number, line in enumerate([*source.splitlines(), ""], 1):
        is_cell_row = line.lstrip().startswith("|")
        is_break = not line.strip() or is_cell_row or re.match(r"\s*(#|>|[-*+] |\d+\. |\[[^\]]+\]:)", line)
        if is_break and paragraph:
            yield from _sentences(path, start, paragraph)
            paragraph = []
        if is_cell_row:
            yield from (Text(path, number, "page", cell.strip()) for cell in line.strip().strip("|").split(" | "))
        elif line.strip():
            start = start if paragraph else number
            paragraph.append(re.sub(r"^\s*(#+|>|[-*+]|\d+\.)\s+", "", line).strip())


def _sentences(path: str, start: int, lines: list[str]) -> Iterator[Text]:
    whole = " ".join(lines)
    begin = 0
    for sentence in _SENTENCE_END.split(whole):
        begin = whole.index(sentence, begin)
        read = 0
        line = start
        for text in lines:  # the line of the paragraph in which the sentence begins
            read += len(text) + 1
            if read > begin:
                break
            line += 1
        yield Text(path, line, "page", sentence)


def in_json(path: str, source: str) -> Iterator[Text]:
    """Yield titles and descriptions, such as a dashboard has."""
    for match in re.finditer(r'"(?:title|description)": ("(?:[^"\\]|\\.)*")', source):
        yield Text(path, source.count("\n", 0, match.start()) + 1, "message", json.loads(match[1]))


_READERS = {".py": in_python, ".sql": in_sql, ".md": in_markdown, ".json": in_json} | dict.fromkeys(
    ("", ".cfg", ".conf", ".service", ".toml", ".yml", ".yaml", ".sh"), in_config
)


def collect(root: Path = ROOT, places: Iterable[str] = ("",)) -> list[Text]:
    """Return every text of at least three words in the files whose path begins with one of the places, in the order of
    files and lines."""
    files = [root / name for name in FILES]
    files += sorted(path for folder in FOLDERS for path in (root / folder).rglob("*"))
    named = {path.relative_to(root).as_posix(): path for path in files if path.is_file()}
    chosen = {name: path for name, path in named.items() if name.startswith(tuple(places))}
    texts = {text for name, path in chosen.items() for text in _in_file(path, name)}
    return sorted(text for text in texts if len(_WORD.findall(_NAMES.sub("", text.text))) >= MIN_WORDS)


def _in_file(path: Path, name: str) -> Iterable[Text]:
    reader = _READERS.get(path.suffix)
    if reader is None or name.startswith((*FINAL, *EXAMPLES, "bench/results/")) or "__pycache__" in name:
        return ()
    return reader(name, path.read_text(encoding="utf-8"))


def sample(texts: list[Text], seed: int, count: int) -> list[Text]:
    """Return `count` of the texts, chosen by the seed, in the order of their places."""
    chance = random.Random(seed)  # noqa: S311 - the same seed is to pick the same texts
    return sorted(chance.sample(texts, min(count, len(texts))))


def main(arguments: list[str] | None = None) -> int:
    """Print the sample; return the exit code."""
    parser = argparse.ArgumentParser(description="Print texts of the repository picked at random.")
    parser.add_argument("--seed", type=int, required=True, help="the same seed picks the same texts")
    parser.add_argument("--count", type=int, default=50, help="how many texts (default: 50)")
    parser.add_argument("places", nargs="*", help="only texts of files whose path begins so, for example nexhb/http")
    options = parser.parse_args(arguments)
    texts = collect(places=options.places or ("",))
    for text in sample(texts, options.seed, options.count):
        print(f"{text.path}:{text.line} ({text.kind})\n{textwrap.indent(textwrap.dedent(text.text), '    ')}\n")
    print(f"{min(options.count, len(texts))} of {len(texts)} texts, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
