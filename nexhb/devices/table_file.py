"""Parse a file of devices and tokens, as people and spreadsheets write it. Pure.

Columns may be separated by commas, semicolons, tabs or bars; the text may be UTF-8 or UTF-16; column names may have any
case and contain blanks; rows and columns may be empty. A line that could be read in two ways is rejected by its number.
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
_KNOWN = ("device_id", "alias", "name", *_TOKENS, "site", "tags")
_SEP_LINE = re.compile(r"\ufeff?\"?sep=(.)\"?\r?\n", re.IGNORECASE)  # the line in which Excel names the separator
_SCIENTIFIC = re.compile(r"\d(?:[.,]\d+)?E\+\d+", re.IGNORECASE)


class Row(NamedTuple):
    """One device. Values are stripped of surrounding blanks; a missing value is ''."""

    line: int
    device_id: str
    alias: str
    name: str
    token: str
    token_sha256: str
    site: str = ""
    tags: str = ""  # separated by semicolons, commas or blanks


@dataclass
class DeviceFile:
    """The contents of a file."""

    separator: str
    columns: list[str]  # nexhb's names of the columns that are used
    unused: list[str]
    rows: list[Row] = field(default_factory=list)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)  # number of each bad line, and why it is bad
    empty_rows: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the file has exactly the documented form."""
        return self.separator == "," and not self.unused and not self.empty_rows

    def description(self) -> str:
        """Return a text that says how the file was read."""
        text = f"{len(self.columns)} columns separated by {SEPARATORS[self.separator]}: {', '.join(self.columns)}"
        if self.unused:
            text += f"; not used: {', '.join(self.unused)}"
        rows = "1 empty row" if self.empty_rows == 1 else f"{self.empty_rows} empty rows"
        return text + (f"; {rows}" if self.empty_rows else "")


def parse(raw: bytes) -> DeviceFile:
    """Return the contents of a file. Raise BadInput if it is not a table of devices; bad lines are in `bad_lines`."""
    text = _decode(raw)
    separators = list(SEPARATORS)
    first_line = 0
    if match := _SEP_LINE.match(text):
        if match[1] not in SEPARATORS:
            raise BadInput(f"line 1: {quoted(match[1])} is not a supported separator.")
        separators, text, first_line = [match[1]], text[match.end() :], 1
    headers = {separator: header for separator in separators if (header := _header(text, separator))}
    fitting = [separator for separator, header in headers.items() if _is_complete(header)]
    if len(fitting) != 1:
        raise BadInput(f"the first line must name device_id, alias and token (or token_sha256); {_instead(headers)}.")
    return _read(text, fitting[0], first_line)


def named_cells(raw: bytes, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Return the line and the cells by column of each row of another table, whose first column is required. Raise
    BadInput if the first line names other columns."""
    text = _decode(raw)
    headers = {separator: _header(text, separator) for separator in SEPARATORS}
    separator = next((each for each, header in headers.items() if columns[0] in header), "")
    unknown = [name for name in headers.get(separator, []) if name not in columns]
    if not separator or unknown:
        instead = f"it has {quoted(unknown[0][:50])}" if unknown else f"it does not name {columns[0]}"
        raise BadInput(f"the first line may name {', '.join(columns)}; {instead}.")
    rows = []
    for line, cells, error in _lines(text, separator, 0):
        if error or len(cells) > len(headers[separator]):
            raise BadInput(f"line {line}: {error or 'it has more columns than the first line'}.")
        if _has_content(cells):
            rows.append((line, dict(zip(headers[separator], (cell.strip() for cell in cells), strict=False))))
    return rows[1:]


def _decode(raw: bytes) -> str:
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


def _header(text: str, separator: str) -> list[str]:
    """Return the column names in the first non-empty line, or [] if the text is not CSV."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return next(([_name(cell) for cell in row] for row in reader if _has_content(row)), [])
    except csv.Error:
        return []


def _name(cell: str) -> str:
    return re.sub(r"[\s\-]+", "_", cell.strip().casefold())


def _is_complete(header: list[str]) -> bool:
    return "device_id" in header and any(name in header for name in _TOKENS)


def _instead(headers: dict[str, list[str]]) -> str:
    if not headers:
        return "the file is empty, or not CSV"
    separator = max(headers, key=lambda candidate: len(headers[candidate]))
    names = ", ".join(quoted(name[:50]) for name in headers[separator][:10])
    return f"separated by {SEPARATORS[separator]}, it has: {names}"


def _has_content(row: list[str]) -> bool:
    return any(cell.strip() for cell in row)


def _read(text: str, separator: str, first_line: int) -> DeviceFile:
    lines = _lines(text, separator, first_line)
    header = next([_name(cell) for cell in row] for _, row, _ in lines if _has_content(row))
    if repeated := [name for name in _KNOWN if header.count(name) > 1]:
        raise BadInput(f"the first line names {repeated[0]} twice.")
    unused = [shown(name) for name in header if name and name not in _KNOWN]
    file = DeviceFile(separator, [name for name in _KNOWN if name in header], unused)
    for line, cells, error in lines:
        if not error and not _has_content(cells):
            file.empty_rows += 1
            continue
        values = [cell.strip() for cell in cells]
        by_name = dict(zip(header, values, strict=False))
        row = Row(line, *(by_name.get(name, "") for name in _KNOWN))
        if reason := error or _bad_form(header, values, row):
            file.bad_lines.append((line, reason))
        else:
            file.rows.append(row)
    return file


def _bad_form(header: list[str], values: list[str], row: Row) -> str:
    """Return what is wrong with a row's form, or ''."""
    # A column without a name, which spreadsheets sometimes leave, is accepted if it is empty.
    if any(value for name, value in zip_longest(header, values, fillvalue="") if not name):
        return "the line has more columns than the first line"
    if len(values) == 1 < len(header):
        return f"needs a token, or its SHA-256: it has one column of {len(header)}"
    if _SCIENTIFIC.fullmatch(row.device_id):
        return f"a spreadsheet shortened the number in device_id to {row.device_id}"
    return ""


def _lines(text: str, separator: str, first_line: int) -> Iterator[tuple[int, list[str], str]]:
    """Yield, for each record, the number of its last line, its cells and ''. Where the text is not valid CSV, yield the
    error as the third value, and end."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            yield first_line + reader.line_num, row, ""
    except csv.Error as error:
        yield first_line + reader.line_num, [], str(error)
