"""Tables of devices as spreadsheets write them."""

from __future__ import annotations

import pytest

from nexhb.devices.table_file import Row, parse
from nexhb.errors import BadInput

TOKEN = "token-of-an-old-system-0123456789"
PLAIN = f"device_id,alias,token\nkiosk-1,渋谷店　3号機,{TOKEN}\n"
ROW = ("kiosk-1", "渋谷店　3号機", "", TOKEN, "")


def rows(raw: bytes | str) -> list[Row]:
    """Return the rows of a file without bad lines."""
    file = parse(raw if isinstance(raw, bytes) else raw.encode())
    assert file.bad_lines == []
    return file.rows


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_ends_of_lines(separator: str, encoding: str, end: str) -> None:
    text = PLAIN.replace(",", separator).replace("\n", end)
    assert rows(text.encode(encoding)) == [Row(2, *ROW)]
    bom = "\ufeff" if encoding.startswith("utf-16-") else ""
    assert rows((bom + text).encode(encoding)) == [Row(2, *ROW)]


@pytest.mark.parametrize(
    "header",
    ["Device ID,Alias,Token", " DEVICE_ID , alias, token ", "device-id,ALIAS,token", '"Device_Id","alias","Token"'],
)
def test_column_names_may_have_any_case_and_blanks(header: str) -> None:
    assert rows(PLAIN.replace("device_id,alias,token", header)) == [Row(2, *ROW)]


def test_empty_rows_and_columns_are_skipped_but_counted_in_line_numbers() -> None:
    text = f'\n,,,\nshop,device_id,token,,\nx,a,{TOKEN},,\n,,,,\n  , ,"",,\n\nx,b,{TOKEN}\nx,c,{TOKEN}, ,,,\n,,,,\n'
    file = parse(text.encode())
    assert [(row.line, row.device_id) for row in file.rows] == [(4, "a"), (8, "b"), (9, "c")]
    assert (file.bad_lines, file.empty_rows) == ([], 4)
    assert file.description() == (
        "2 columns separated by commas: device_id, token; not used: shop; 4 empty rows"
    )  # fmt: skip


def test_excels_sep_line_names_the_separator() -> None:
    assert rows("sep=;\r\n" + PLAIN.replace(",", ";")) == [Row(3, *ROW)]
    with pytest.raises(BadInput, match="line 1"):
        parse(b"sep=#\ndevice_id#token\n")


def test_a_quoted_value_may_contain_any_separator() -> None:
    text = f'device_id;alias;token\n"a;1";"Store ""7"", by the door";{TOKEN}\n'
    assert rows(text) == [Row(2, "a;1", 'Store "7", by the door', "", TOKEN, "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"device_id:token\na:{TOKEN}\n", "separated by commas, it has: 'device_id:token'"),
        ("device_id;alias;secret\n", "separated by semicolons, it has: 'device_id', 'alias', 'secret'"),
        ("", "empty"),
        (f"device_id,token,Token\na,{TOKEN},x\n", "names token twice"),
        ("device_id,alias,token\na,Stra\udce9e,x\n", "line 2 is not UTF-8"),
        ("device_id,token,x;device_id;token\na,b,c;d;e\n", "must name device_id"),  # separated by , and by ;
    ],
)
def test_the_error_for_another_file_says_what_its_first_line_has(text: str, message: str) -> None:
    with pytest.raises(BadInput) as rejected:
        parse(text.encode("utf-8", "surrogateescape"))
    assert message in str(rejected.value)


def test_only_the_start_of_a_long_first_line_is_quoted() -> None:
    with pytest.raises(BadInput) as rejected:
        parse(";".join("x" * 5_000 for _ in range(500)).encode())
    assert len(str(rejected.value)) < 1_000


def test_an_id_that_only_begins_in_scientific_notation_is_accepted() -> None:
    assert rows(f"device_id,token\n8E+14-kiosk,{TOKEN}\n") == [Row(2, "8E+14-kiosk", "", "", TOKEN, "")]


def test_an_ambiguous_line_is_reported_by_its_number_and_the_lines_after_it_are_still_read() -> None:
    text = f"device_id;token;\nkiosk-1,{TOKEN}\nb;{TOKEN};over\n8.99123E+14;{TOKEN}\nc;{TOKEN};;x\nd;{TOKEN}\n"
    file = parse(text.encode())
    assert [line for line, _ in file.bad_lines] == [2, 3, 4, 5]
    for (_, reason), expected in zip(file.bad_lines, ("one column", "more columns", "spreadsheet"), strict=False):
        assert expected in reason
    assert [row.device_id for row in file.rows] == ["d"]
    assert parse(f'device_id,token\na,"{TOKEN}"x\nb,{TOKEN}\n'.encode()).bad_lines[0][0] == 2
