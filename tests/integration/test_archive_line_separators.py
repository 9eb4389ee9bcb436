"""An SSID may contain U+2028, U+0085 or a form feed, which COPY writes unquoted into the CSV. Formerly, splitlines
mistook each of them for the end of a row: a day with such a row got no supplement any more, and `nexhb archive get`
failed. The time-lapse found this."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from nexhb.archive.verify import _whole_rows

_TEXTS = st.text(st.sampled_from('a,"\n\r\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\\'), min_size=1)


def _as_copy_writes(rows: list[list[str]]) -> bytes:
    out = io.StringIO(newline="")
    for row in rows:
        cells = ('"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text for text in row)
        out.write(",".join(cells) + "\n")
    return out.getvalue().encode()


@given(st.lists(st.lists(_TEXTS, min_size=2, max_size=3), min_size=1, max_size=4), st.integers(0, 200))
def test_rows_are_parsed_whatever_their_texts_contain_and_wherever_a_piece_ends(
    rows: list[list[str]], cut: int
) -> None:
    data = _as_copy_writes(rows)
    first, rest = _whole_rows(data[:cut])
    second, rest = _whole_rows(rest + data[cut:])
    assert (first + second, rest) == (rows, b"")


def test_rows_of_pythons_csv_writer_are_parsed_too() -> None:
    row = ["kiosk", "Caf\u00e9\u2028\x85\x0b\x0c\x1e", 'a "quoted",\r\nname']
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow(row)
    assert _whole_rows(out.getvalue().encode()) == ([row], b"")
