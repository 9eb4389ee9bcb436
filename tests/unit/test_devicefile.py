"""Tables of devices as spreadsheets write them."""

from __future__ import annotations

import pytest

from nexhb.devicefile import DeviceFile, Row, parse
from nexhb.errors import BadInput

TOKEN = "token-of-an-old-system-0123456789"
PLAIN = f"device_id,alias,token\nkiosk-1,渋谷店　3号機,{TOKEN}\n"
ROW = ("kiosk-1", "渋谷店　3号機", "", TOKEN, "")


def rows(raw: bytes | str) -> list[Row]:
    """The rows of a file in which nothing is wrong."""
    found = parse(raw if isinstance(raw, bytes) else raw.encode())
    assert found.bad == []
    return found.rows


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_ends_of_lines(separator: str, encoding: str, end: str) -> None:
    text = PLAIN.replace(",", separator).replace("\n", end)
    assert rows(text.encode(encoding)) == [Row(2, *ROW)]
    bom = "\ufeff" if encoding.startswith("utf-16-") else ""
    assert rows((bom + text).encode(encoding)) == [Row(2, *ROW)]


@pytest.mark.parametrize(
    "head",
    ["Device ID,Alias,Token", " DEVICE_ID , alias, token ", "device-id,ALIAS,token", '"Device_Id","alias","Token"'],
)
def test_names_of_columns_in_any_case_with_blanks(head: str) -> None:
    assert rows(PLAIN.replace("device_id,alias,token", head)) == [Row(2, *ROW)]


def test_rows_and_columns_without_content_are_passed_over_and_lines_still_count() -> None:
    text = f'\n,,,\nsite,device_id,token,,\nx,a,{TOKEN},,\n,,,,\n  , ,"",,\n\nx,b,{TOKEN}\nx,c,{TOKEN}, ,,,\n,,,,\n'
    found = parse(text.encode())
    assert [(row.line, row.device_id) for row in found.rows] == [(4, "a"), (8, "b"), (9, "c")]
    assert (found.bad, found.without_content) == ([], 4)
    assert found.found() == (
        "2 columns separated by commas: device_id, token; not used: site; 4 rows without content"
    )  # fmt: skip


def test_excels_own_line_names_the_separator() -> None:
    assert rows("sep=;\r\n" + PLAIN.replace(",", ";")) == [Row(3, *ROW)]
    with pytest.raises(BadInput, match="line 1"):
        parse(b"sep=#\ndevice_id#token\n")


def test_what_is_quoted_may_hold_every_separator() -> None:
    text = f'device_id;alias;token\n"a;1";"Store ""7"", by the door";{TOKEN}\n'
    assert rows(text) == [Row(2, "a;1", 'Store "7", by the door', "", TOKEN, "")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"device_id:token\na:{TOKEN}\n", "separated by commas: 'device_id:token'"),
        ("device_id;alias;secret\n", "separated by semicolons: 'device_id', 'alias', 'secret'"),
        ("", "empty"),
        (f"device_id,token,Token\na,{TOKEN},x\n", "names token twice"),
        ("device_id,alias,token\na,Stra\udce9e,x\n", "line 2 is not UTF-8"),
        ("device_id,token,x;device_id;token\na,b,c;d;e\n", "must name device_id"),  # by commas and by semicolons
    ],
)
def test_what_is_no_such_table_says_what_was_found(text: str, says: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse(text.encode("utf-8", "surrogateescape"))
    assert says in str(refused.value)


def test_of_a_first_line_that_is_something_else_the_beginning_is_repeated() -> None:
    with pytest.raises(BadInput) as refused:
        parse(";".join("x" * 5_000 for _ in range(500)).encode())
    assert len(str(refused.value)) < 1_000


def test_an_id_that_only_begins_like_a_shortened_number_is_one() -> None:
    assert rows(f"device_id,token\n8E+14-kiosk,{TOKEN}\n") == [Row(2, "8E+14-kiosk", "", "", TOKEN, "")]


def bad(text: str) -> list[tuple[int, str]]:
    """The lines that are wrong."""
    found: DeviceFile = parse(text.encode())
    return found.bad


def test_what_may_be_read_in_two_ways_is_refused_by_its_line_and_the_next_ones_are_looked_at() -> None:
    text = f"device_id;token;\nkiosk-1,{TOKEN}\nb;{TOKEN};over\n8.99123E+14;{TOKEN}\nc;{TOKEN};;x\nd;{TOKEN}\n"
    found = parse(text.encode())
    assert [line for line, _ in found.bad] == [2, 3, 4, 5]
    assert ["one column" in found.bad[0][1], "more columns" in found.bad[1][1], "spreadsheet" in found.bad[2][1]] == [
        True
    ] * 3
    assert [row.device_id for row in found.rows] == ["d"]
    assert bad(f'device_id,token\na,"{TOKEN}"x\nb,{TOKEN}\n')[0][0] == 2
