"""Lists on the command line: complete in a pipe and at a terminal, and truncated only with a note."""

from __future__ import annotations

import sys
from typing import Any, cast

import pytest

from nexhb.cli import devices, tables
from nexhb.devices import registry as store
from nexhb.postgres.connections import Connection

LONG = "x" * 500
ROWS = [("kiosk-1", LONG), ("[bold]kiosk[/bold] \N{SMILING FACE WITH OPEN MOUTH}", "a\tb\x1b[2Jc\nd")]


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool) -> str:
    """Return the output for ROWS."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    tables.show(("device_id", "alias"), ROWS)
    return capsys.readouterr().out


def test_in_a_pipe_a_row_is_one_complete_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Formerly, the list had a box around it, and was truncated at 80 columns."""
    lines = shown(monkeypatch, capsys, terminal=False).split("\n")
    assert lines == [
        "device_id\talias", f"kiosk-1\t{LONG}",
        "[bold]kiosk[/bold] \N{SMILING FACE WITH OPEN MOUTH}\ta\ufffdb\ufffd[2Jc\ufffdd", "",
    ]  # fmt: skip


def test_at_a_terminal_a_long_cell_is_wrapped_and_markup_is_not_interpreted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys, terminal=True)
    assert text.count("x") == len(LONG)
    assert "…" not in text
    assert "\x1b[2J" not in text
    assert "[bold]" in text


@pytest.mark.parametrize("devices_there", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 6, 7, 100])
async def test_only_a_truncated_list_names_where_to_continue(
    monkeypatch: pytest.MonkeyPatch, devices_there: int, limit: int | None
) -> None:
    """Formerly, with 20,000 devices, `devices list` printed 100 of them without a note."""
    names = [f"kiosk-{number}" for number in range(devices_there)]

    async def page(_conn: object, after: str, wanted: int) -> list[dict[str, Any]]:
        assert 0 < wanted <= 3
        return [{"device_id": name} for name in names if name > after][:wanted]

    monkeypatch.setattr(devices, "PAGE", 3)
    monkeypatch.setattr(store, "page", page)
    rows, following = await devices._pages(cast(Connection, None), "", limit)
    found = [row["device_id"] for row in rows]
    assert found == names[:limit]
    assert following == (found[-1] if len(found) < len(names) else None)
