"""A table of devices and tokens as people and spreadsheets write it → its rows. Pure.

Taken are commas, semicolons, tabs or bars; UTF-8 and UTF-16; any case and blanks in the names of columns; rows and
columns without content. What could be read in two ways is refused by its line.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from nexhb.errors import BadInput
from nexhb.texts import quoted, shown

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_TOKENS = ("token", "token_sha256")
_KNOWN = ("device_id", "alias", "name", *_TOKENS)
_SEP_LINE = re.compile(r"\ufeff?\"?sep=(.)\"?\r?\n", re.IGNORECASE)  # Excel's own way to name the separator
_SHORTENED = re.compile(r"\d(?:[.,]\d+)?E\+\d+", re.IGNORECASE)


class Row(NamedTuple):
    """One device; texts as they stand, without blanks around them, '' where there is none."""

    line: int
    device_id: str
    alias: str
    name: str
    token: str
    token_sha256: str


@dataclass
class DeviceFile:
    """What a file holds."""

    separator: str
    columns: list[str]  # those that are used, by their own names
    unused: list[str]
    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)  # line, what is wrong with it
    without_content: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is just as documented, with nothing to say about it."""
        return self.separator == "," and not self.unused and not self.without_content

    def found(self) -> str:
        """A sentence on what was found."""
        text = f"{len(self.columns)} columns separated by {SEPARATORS[self.separator]}: {', '.join(self.columns)}"
        if self.unused:
            text += f"; not used: {', '.join(self.unused)}"
        rows = "1 row" if self.without_content == 1 else f"{self.without_content} rows"
        return text + (f"; {rows} without content" if self.without_content else "")


def parse(raw: bytes) -> DeviceFile:
    """The rows of a file. Raises BadInput where it is no such table as a whole; a bad line is in `bad`."""
    text = _decoded(raw)
    separators = list(SEPARATORS)
    first_line = 0
    if said := _SEP_LINE.match(text):
        if said[1] not in SEPARATORS:
            raise BadInput(f"line 1: columns separated by {quoted(said[1])} are not taken.")
        separators, text, first_line = [said[1]], text[said.end() :], 1
    heads = {separator: head for separator in separators if (head := _head(text, separator))}
    fitting = [separator for separator, head in heads.items() if _fits(head)]
    if len(fitting) != 1:
        raise BadInput(f"the first line must name device_id, alias and token (or token_sha256); {_instead(heads)}.")
    return _read(text, fitting[0], first_line)


def _decoded(raw: bytes) -> str:
    head = raw[:400]
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif len(head) > 8 and head[1::2].count(0) > len(head) // 3:
        encoding = "utf-16-le"
    elif len(head) > 8 and head[::2].count(0) > len(head) // 3:
        encoding = "utf-16-be"
    else:
        encoding = "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + raw[: error.start].count(b"\n")
        raise BadInput(
            f"line {line} is not {'UTF-16' if '16' in encoding else 'UTF-8'}: {error.reason}.",
            hint='Spreadsheets write UTF-8 as "CSV UTF-8".',
        ) from None


def _head(text: str, separator: str) -> list[str]:
    """The names in the first line with content; none where it is no CSV."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return next(([_name(cell) for cell in row] for row in reader if _has_content(row)), [])
    except csv.Error:
        return []


def _name(cell: str) -> str:
    return re.sub(r"[\s\-]+", "_", cell.strip().casefold())


def _fits(head: list[str]) -> bool:
    return "device_id" in head and any(name in head for name in _TOKENS)


def _instead(heads: dict[str, list[str]]) -> str:
    if not heads:
        return "it is empty, or no CSV"
    separator = max(heads, key=lambda one: len(heads[one]))
    found = ", ".join(quoted(name[:50]) for name in heads[separator][:10])
    return f"it has, separated by {SEPARATORS[separator]}: {found}"


def _has_content(row: list[str]) -> bool:
    return any(cell.strip() for cell in row)


def _read(text: str, separator: str, first_line: int) -> DeviceFile:
    lines = _lines(text, separator, first_line)
    head = next([_name(cell) for cell in row] for _, row, _ in lines if _has_content(row))
    if twice := [name for name in _KNOWN if head.count(name) > 1]:
        raise BadInput(f"the first line names {twice[0]} twice.")
    unused = [shown(name) for name in head if name and name not in _KNOWN]
    found = DeviceFile(separator, [name for name in _KNOWN if name in head], unused)
    for line, row, wrong in lines:
        if not wrong and not _has_content(row):
            found.without_content += 1
            continue
        cells = [cell.strip() for cell in row]
        named = dict(zip(head, cells, strict=False))
        one = Row(line, *(named.get(name, "") for name in _KNOWN))
        if wrong := wrong or _wrong(head, cells, one):
            found.bad.append((line, wrong))
        else:
            found.rows.append(one)
    return found


def _wrong(head: list[str], cells: list[str], one: Row) -> str:
    """What is wrong with a row's form; '' where nothing is."""
    # A column without a name, as spreadsheets leave them behind, is taken where nothing stands in it.
    if any(cell for name, cell in zip_longest(head, cells, fillvalue="") if not name):
        return "it has more columns than the first line"
    if len(cells) == 1 < len(head):
        return f"takes a token, or its SHA-256: it has one column of {len(head)}"
    if _SHORTENED.fullmatch(one.device_id):
        return f"a spreadsheet shortened the number of its device_id to {one.device_id}"
    return ""


def _lines(text: str, separator: str, first_line: int) -> Iterator[tuple[int, list[str], str]]:
    """Each record with the line that it ends on. What is no CSV ends them, and says why."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            yield first_line + reader.line_num, row, ""
    except csv.Error as error:
        yield first_line + reader.line_num, [], str(error)
